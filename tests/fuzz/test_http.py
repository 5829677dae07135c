"""The server by its own OpenAPI schema: whatever is asked, the status and the reply are among those it announces."""

import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")

from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402

from moe_lab.serve.limits import Limits  # noqa: E402
from tests.fuzz.fuzzing import each  # noqa: E402
from tests.serve.served import NAME, engine, running  # noqa: E402

load_all_checks()
NAMES = (
  "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
  "response_headers_conformance",
)  # fmt: skip
EXAMPLES = 300
FEW = 3  # new tokens, where more would only take time


@pytest.fixture(scope="module")
def server():
  with running(engine(), bounds=Limits(queue=64)) as server:
    yield server


def asked(case):
  """Has a request reach the engine: the model's own name, few tokens, and the page's JSON."""
  if isinstance(case.body, dict):
    if isinstance(case.body.get("model"), str):
      case.body["model"] = NAME
    for name in ("max_tokens", "max_completion_tokens"):
      if isinstance(most := case.body.get(name), int) and not isinstance(most, bool) and most > FEW:
        case.body[name] = FEW
    if case.path == "/v1/chat/completions":
      case.body.setdefault("max_tokens", FEW)
  return case


@pytest.mark.slow
@pytest.mark.fault("security: the server answers whatever it is asked")
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_place_of_the_schema(server, mode):
  schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
  checks = [CHECKS.get_one(name) for name in NAMES]
  seen = {}
  for found in schema.get_all_operations():
    operation = found.ok()
    posts = operation.method.lower() == "post"

    def check(case, operation=operation):
      response = asked(case).call_and_validate(checks=checks)
      seen.setdefault(operation.path, set()).add(response.status_code)

    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    if posts or mode == "positive":
      each(strategy, EXAMPLES if posts else 5, check)
  generating = seen["/v1/completions"], seen["/v1/chat/completions"]
  assert all(200 in statuses if mode == "positive" else 400 in statuses for statuses in generating), seen
