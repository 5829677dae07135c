"""The places of the server and what they answer."""

import asyncio
import base64
import functools
import hashlib
import importlib.resources
import re
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from moe_lab.serve import limits, metrics, replies
from moe_lab.serve.answering import Answer
from moe_lab.serve.fields import ChatFields, CompletionFields, GenerationFields, refusal_of
from moe_lab.serve.forms import ChatForm, CompletionForm, Form
from moe_lab.serve.guard import OPEN
from moe_lab.serve.limits import Limits
from moe_lab.serve.refusals import STATUSES, Refusal, json_response
from moe_lab.serve.served import ServedModel
from moe_lab.serve.worker import Job, Worker

COMPLETION_TOKENS = 16  # of /v1/completions where nothing is said, as OpenAI has it


def make_app(
  served: ServedModel,
  worker: Worker,
  measured: metrics.Metrics,
  bounds: Limits,
  *,
  is_ending: Callable[[], bool],
  with_key: bool,
) -> FastAPI:
  """Returns the application.

  Args:
    served: the model.
    worker: that serves it.
    measured: its figures.
    bounds: what may be asked.
    is_ending: whether the server is about to end.
    with_key: whether the guard wants a key; the schema says so.
  """
  app = FastAPI(title="moe_lab", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
  policy, page = _page()

  @app.get("/", response_class=HTMLResponse, include_in_schema=False)
  async def page_at_root():
    return HTMLResponse(page, headers={"content-security-policy": policy, "x-frame-options": "DENY"})

  @app.get("/healthz", responses=_responses(replies.Health, 403, 503))
  async def healthz():
    """Whether the engine works and new requests are taken."""
    if trouble := worker.trouble or ("the server is ending" if is_ending() else None):
      raise Refusal(503, trouble)
    return json_response({"status": "ok"})

  @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(401, 403))
  async def prometheus():
    """Figures for Prometheus."""
    return Response(measured.text(), media_type=metrics.CONTENT_TYPE)

  @app.get("/v1/models", responses=_responses(replies.ModelList, 401, 403))
  async def models():
    """The one model."""
    return json_response({"object": "list", "data": [served.card]})

  @app.get("/v1/models/{model:path}", responses=_responses(replies.ModelCard, 401, 403, 404))
  async def model_of_name(model: str):
    """The model, by its name."""
    served.check_name(model)
    return json_response(served.card)

  @app.post("/v1/completions", responses=_responses(replies.Completion, *_GENERATING, stream=True))
  async def completions(fields: CompletionFields):
    """Writes on from a prompt, or several."""
    served.check_name(fields.model)
    asked = fields.prompt
    several = isinstance(asked, list) and not isinstance(asked[0], int)
    prompts = asked if several else [asked]
    _check_choices(fields, len(prompts), worker.most)
    ids = await asyncio.to_thread(lambda: [served.ids_of_text(p) if isinstance(p, str) else p for p in prompts])
    most = fields.max_tokens
    if most is None:
      most = max(1, min(COMPLETION_TOKENS, *(served.capacity - len(prompt) for prompt in ids)))
    scored = fields.echo and fields.logprobs is not None
    more = {"top": fields.logprobs or 0, "log_probs_from": 1 if scored else None}
    requests = served.requests(fields, ids, "prompt", most, **more)
    _check_alternatives(requests, more["top"])
    texts = [p if isinstance(p, str) else served.tokenizer.decode(p) for p in prompts] if fields.echo else None
    return answer(fields, CompletionForm(served, fields, requests, prompt_texts=texts, hidden=most == 0), requests)

  @app.post("/v1/chat/completions", responses=_responses(replies.ChatCompletion, *_GENERATING, stream=True))
  async def chat(fields: ChatFields):
    """Answers a conversation."""
    served.check_name(fields.model)
    _check_choices(fields, 1, worker.most)
    given = [most for most in (fields.max_tokens, fields.max_completion_tokens) if most is not None]
    most, top = min(given, default=None), fields.top_logprobs or 0
    ids = await asyncio.to_thread(served.ids_of_messages, fields.messages)
    requests = served.requests(fields, [ids], "messages", most, top=top)
    _check_alternatives(requests, top)
    return answer(fields, ChatForm(served, fields, requests, hidden=most == 0), requests)

  def answer(fields: GenerationFields, form: Form, requests: list) -> Answer:
    return Answer(
      worker, Job(requests), form, stream=bool(fields.stream), seconds=bounds.seconds, gave_up=measured.cancelled.inc
    )

  @app.exception_handler(Refusal)
  async def refused(request: Request, refusal: Refusal):
    return refusal.response()

  @app.exception_handler(RequestValidationError)
  async def not_valid(request: Request, error: RequestValidationError):
    return refusal_of(error.errors()).response()

  @app.exception_handler(Exception)
  async def mistaken(request: Request, error: Exception):
    return Refusal(500, "the server made a mistake", code="internal_error", close=True).response()

  @app.exception_handler(HTTPException)
  async def of_framework(request: Request, error: HTTPException):
    words = {404: "no such place", 405: f"not a method of this place: {request.method}"}
    response = Refusal(error.status_code, words.get(error.status_code, "the body cannot be read")).response()
    response.headers.update({k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"})
    return response

  app.openapi = functools.cache(lambda: _schema(app, served, with_key))
  return app


_GENERATING = (400, 401, 403, 404, 408, 413, 429, 500, 503)


def _errors(*statuses: int) -> dict:
  return {status: {"model": replies.Error, "description": STATUSES[status]} for status in statuses}


def _responses(model: type, *statuses: int, stream: bool = False) -> dict:
  """Returns what a place answers, for the schema."""
  content = {"content": {"text/event-stream": {}}} if stream else {}
  return {200: {"model": model, **content}} | _errors(*statuses)


def _check_choices(fields: GenerationFields, prompts: int, room: int) -> None:
  choices, most = prompts * (fields.n or 1), min(limits.CHOICES, room)
  if choices > most:
    wanted = f"wanted at most {most} responses a request, n for each prompt"
    raise Refusal(400, f"n = {fields.n or 1}: {wanted}, not {choices}", param="n")


def _check_alternatives(requests: list, top: int) -> None:
  tokens = sum(r.max_tokens + (0 if r.log_probs_from is None else len(r.prompt)) for r in requests)
  if tokens * top > limits.ALTERNATIVES:
    wanted = f"wanted at most {limits.ALTERNATIVES:,} likeliest tokens a request, not {top} for each of {tokens:,}"
    raise Refusal(400, f"logprobs: {wanted}", param="logprobs")


def _schema(app: FastAPI, served: ServedModel, with_key: bool) -> dict:
  """Returns the OpenAPI schema: FastAPI's, without its own reply to bad fields, and with this model's bounds."""
  schema = FastAPI.openapi(app)
  for path, place in schema["paths"].items():
    for operation in place.values():
      operation["responses"].pop("422", None)
      if with_key and path not in OPEN:
        operation["security"] = [{"key": []}]
  if with_key:
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
  for name in ("HTTPValidationError", "ValidationError"):
    schema["components"]["schemas"].pop(name, None)
  low, high = served.card["compute"]["budgets"]
  most = {"maximum": served.capacity - 1}
  for name, bounds in (
    ("ComputeFields", {"budget": {"minimum": low, "maximum": high}}),
    ("ComputeFields", {"max_experts": {"minimum": served.card["compute"]["max_experts"][0]}}),
    ("CompletionFields", {"max_tokens": most}),
    ("ChatFields", {"max_tokens": most, "max_completion_tokens": most}),
  ):
    for field, bound in bounds.items():
      number, _ = schema["components"]["schemas"][name]["properties"][field]["anyOf"]  # or null
      number |= bound
  return schema


def _page() -> tuple[str, str]:
  """Returns the page and the policy by which its browser runs its own script and nothing else."""
  page = (importlib.resources.files("moe_lab.serve") / "page.html").read_text(encoding="utf-8")

  def hashes(tag: str) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

  policy = (
    f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  )
  return policy, page
