"""OpenAI's own client, unchanged, and what it gets."""

import json
import math

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from moe_lab.infer.request import Request  # noqa: E402
from moe_lab.serve import limits, replies  # noqa: E402
from tests.serve.served import CAPACITY, NAME, ask, engine, running, tokenizer  # noqa: E402

PROMPT = "def function_1(x):"
TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "höher?"}]
EXPECTED = {}


def ids(text: str) -> list[int]:
  return [tokenizer().bos_id, *tokenizer().encode(text).tolist()]


def talk_ids() -> list[int]:
  parts = "<system>\nBe short.\n", "<user>\nhöher?\n", "<assistant>\n"
  return [tokenizer().bos_id, *(token for part in parts for token in tokenizer().encode(part).tolist())]


@pytest.fixture(scope="module")
def served():
  requests = {
    "prompt": Request(ids(PROMPT), 24, stop_token=tokenizer().eos_id, top=5, log_probs_from=1),
    "talk": Request(talk_ids(), 12, stop_token=tokenizer().eos_id, top=3),
    "thrifty": Request(ids(PROMPT), 24, stop_token=tokenizer().eos_id, budget=1.0, max_experts=1),
  }
  names = list(requests)
  for index, token in engine().generate(requests.values()):
    EXPECTED.setdefault(names[index], []).append(token)
  with running(engine()) as server:
    yield server


@pytest.fixture(scope="module")
def client(served):
  with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
    yield client


def text_of(tokens) -> str:
  return "".join(token.text for token in tokens)


def test_a_greedy_completion_is_the_engines(client):
  reply = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0)
  tokens = EXPECTED["prompt"]
  (choice,) = reply.choices
  assert choice.text == text_of(tokens) and choice.finish_reason == tokens[-1].finish
  assert reply.usage.prompt_tokens == len(ids(PROMPT)) and reply.usage.completion_tokens == len(tokens) == 24
  assert reply.compute["experts"] == pytest.approx([token.experts for token in tokens], abs=1e-4)
  assert reply.compute["mean_experts"] == pytest.approx(sum(token.experts for token in tokens) / 24)
  assert reply.compute["tokens"] == [24] and reply.compute["budget"] == 2.0


def test_ids_are_taken_as_they_are(client):
  reply = client.completions.create(model=NAME, prompt=ids(PROMPT), max_tokens=24, temperature=0)
  assert reply.choices[0].text == text_of(EXPECTED["prompt"])


def test_several_prompts_and_n_make_choices_side_by_side(client):
  reply = client.completions.create(model=NAME, prompt=[PROMPT, "x", PROMPT], n=2, max_tokens=24, temperature=0)
  texts = [choice.text for choice in reply.choices]
  assert [choice.index for choice in reply.choices] == list(range(6))
  assert texts[0] == texts[1] == texts[4] == texts[5] == text_of(EXPECTED["prompt"]) != texts[2] == texts[3]
  assert reply.usage.prompt_tokens == 2 * len(ids(PROMPT)) + len(ids("x"))
  assert sum(reply.compute["tokens"]) == len(reply.compute["experts"]) == reply.usage.completion_tokens


@pytest.mark.parametrize("stop", [None, "stop"])
def test_the_pieces_of_a_stream_are_the_whole_text(client, stop):
  asked = dict(model=NAME, prompt=PROMPT, max_tokens=60, temperature=1.5, seed=4)
  whole = client.completions.create(**asked)
  if stop:
    # Some characters from within, so that the stop string is found and lies across tokens.
    text = whole.choices[0].text
    asked["stop"] = [text[10:13], "never there"]
    whole = client.completions.create(**asked)
    assert whole.choices[0].finish_reason == "stop" and whole.choices[0].text == text[: text.index(text[10:13])]
  chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
  *pieces, last = chunks
  assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
  assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [
    whole.choices[0].finish_reason
  ]
  assert last.choices == [] and last.usage == whole.usage
  experts = [value for piece in pieces for value in piece.compute["experts"]]
  assert experts == whole.compute["experts"]
  for key in ("mean_experts", "flops_per_token", "budget"):
    assert pieces[-1].compute[key] == pytest.approx(last.compute[key]) == pytest.approx(whole.compute[key])


def test_the_choices_of_a_stream_are_told_apart(client):
  asked = dict(model=NAME, prompt=[PROMPT, "x"], n=2, max_tokens=9, temperature=1.0, seed=1)
  whole = client.completions.create(**asked)
  texts = [""] * 4
  for chunk in client.completions.create(**asked, stream=True):
    texts[chunk.choices[0].index] += chunk.choices[0].text
  assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 4


def test_a_seed_repeats_the_draws(client):
  def draw(**seed):
    asked = dict(model=NAME, prompt=PROMPT, max_tokens=16, temperature=1.5)
    return client.completions.create(**asked, **seed).choices[0].text

  assert draw(seed=7) == draw(seed=7) == draw(seed=7 - 2**31) != draw(seed=8)
  assert len({draw() for _ in range(3)}) > 1


def test_log_probabilities_of_a_completion(client):
  reply = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, logprobs=2)
  tokens, told = EXPECTED["prompt"], reply.choices[0].logprobs
  assert told.token_logprobs == pytest.approx([token.log_prob for token in tokens], abs=1e-5)
  assert all(max(top.values()) == top[token] for top, token in zip(told.top_logprobs, told.tokens, strict=True))
  best = [sorted(top.values(), reverse=True)[:2] for top in told.top_logprobs]
  np_top = [[log_prob for _, log_prob in token.top[:2]] for token in tokens]
  assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(best, np_top, strict=True))
  text = reply.choices[0].text
  for offset, token in zip(told.text_offset, told.tokens, strict=True):
    assert token.startswith("bytes:") or text[offset : offset + len(token)] == token


def test_echo_scores_the_prompt(client):
  asked = dict(model=NAME, max_tokens=0, temperature=0, echo=True, logprobs=1)
  scores = EXPECTED["prompt"][0].prompt
  of_text = client.completions.create(prompt=PROMPT, **asked).choices[0]
  assert of_text.text == PROMPT == "".join(of_text.logprobs.tokens)
  assert of_text.logprobs.token_logprobs == pytest.approx(scores.log_prob.tolist(), abs=1e-5)
  of_ids = client.completions.create(prompt=ids(PROMPT), **asked).choices[0]
  assert of_ids.logprobs.token_logprobs[0] is None and of_ids.logprobs.top_logprobs[0] is None
  assert of_ids.logprobs.token_logprobs[1:] == of_text.logprobs.token_logprobs
  told = zip(of_text.logprobs.top_logprobs, of_text.logprobs.tokens, strict=True)
  greedy = [max(top.values()) == top[token] for top, token in told]
  assert greedy == scores.greedy.tolist()
  both = client.completions.create(prompt=PROMPT, **asked | {"max_tokens": 24}).choices[0]
  assert both.text == PROMPT + text_of(EXPECTED["prompt"])
  assert both.logprobs.token_logprobs[-24:] == pytest.approx([t.log_prob for t in EXPECTED["prompt"]], abs=1e-5)
  streamed = list(client.completions.create(prompt=PROMPT, **asked | {"max_tokens": 24}, stream=True))
  assert "".join(chunk.choices[0].text for chunk in streamed) == both.text
  assert [v for chunk in streamed for v in chunk.choices[0].logprobs.text_offset] == both.logprobs.text_offset
  assert [v for chunk in streamed for v in chunk.choices[0].logprobs.tokens] == both.logprobs.tokens


def test_chat(client):
  reply = client.chat.completions.create(model=NAME, messages=TALK, max_completion_tokens=12, temperature=0)
  (choice,) = reply.choices
  assert choice.message.role == "assistant" and choice.message.content == text_of(EXPECTED["talk"])
  assert reply.usage.prompt_tokens == len(talk_ids())
  again = TALK + [choice.message.model_dump(), {"role": "user", "content": [{"type": "text", "text": "more"}]}]
  # Greedy, as wherever tokens are counted: a draw may end the response sooner.
  more = client.chat.completions.create(model=NAME, messages=again, max_tokens=3, temperature=0)
  assert more.usage.completion_tokens == 3


def test_chat_fills_the_context_by_default(client):
  asked = dict(model=NAME, messages=TALK, temperature=0)
  usage = client.chat.completions.create(**asked).usage
  assert usage.total_tokens == CAPACITY


def test_a_stream_of_chat_with_log_probabilities(client):
  asked = dict(model=NAME, messages=TALK, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)
  whole = client.chat.completions.create(**asked).choices[0]
  chunks = list(client.chat.completions.create(**asked, stream=True))
  assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
  assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.message.content
  told = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
  assert told == whole.logprobs.content and len(told) == 12
  for entry, token in zip(told, EXPECTED["talk"], strict=True):
    assert entry.logprob == pytest.approx(token.log_prob, abs=1e-5)
    assert bytes(entry.bytes) == tokenizer().token_bytes(token.token)
    assert [t.logprob for t in entry.top_logprobs] == pytest.approx([lp for _, lp in token.top], abs=1e-5)


def test_less_compute_by_request(client):
  asked = dict(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0)
  reply = client.completions.create(**asked, extra_body={"compute": {"budget": 1.0, "max_experts": 1}})
  assert reply.choices[0].text == text_of(EXPECTED["thrifty"])
  assert set(reply.compute["experts"]) == {1.0} and reply.compute["max_experts"] == 1
  full = client.completions.create(**asked)
  assert reply.compute["flops_per_token"] < full.compute["flops_per_token"]


def test_models(client):
  (model,) = client.models.list().data
  assert model == client.models.retrieve(NAME) and model.id == NAME
  assert model.compute["budgets"] == [1.0, 4.0] and model.max_model_len == CAPACITY


@pytest.mark.parametrize(
  "fields, error, words",
  [
    ({"model": "other"}, openai.NotFoundError, "model = 'other': not served here; wanted 'small'"),
    ({"prompt": "x" * 100_000}, openai.BadRequestError, "prompt: it has 100,000 characters; wanted at most 255 tokens"),
    ({"prompt": [5] * CAPACITY}, openai.BadRequestError, "prompt: it has 256 tokens; wanted at most 255 tokens"),
    ({"prompt": [5] * 250, "max_tokens": 7}, openai.BadRequestError, "max_tokens = 7: wanted at most 6"),
    ({"prompt": [360]}, openai.BadRequestError, "prompt: wanted ids from 0 to 359"),
    ({"temperature": 3}, openai.BadRequestError, "temperature = 3: "),
    ({"n": 9}, openai.BadRequestError, "n = 9: "),
    ({"prompt": ["x"] * 5, "n": 4}, openai.BadRequestError, "n = 4: wanted at most 16 responses"),
    ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty = 0.5: not supported; wanted 0"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature: no such field here .did you mean 'temper"),
    (
      {"extra_body": {"compute": {"budget": 9}}},
      openai.BadRequestError,
      "compute.budget=9.0: wanted a number from 1 t",
    ),
  ],
)
def test_mistakes_are_openais_errors(client, fields, error, words):
  with pytest.raises(error, match=words) as raised:
    client.completions.create(**{"model": NAME, "prompt": "x"} | fields)
  assert raised.value.body["type"] == "invalid_request_error" and raised.value.body["param"]


def test_more_likeliest_tokens_than_a_reply_should_hold_are_refused(served, monkeypatch):
  monkeypatch.setattr(limits, "ALTERNATIVES", 120)
  talk = {"model": NAME, "messages": TALK, "n": 2, "max_tokens": 3, "top_logprobs": 20}
  assert ask(served.port, "POST", "/v1/chat/completions", talk)[0] == 200
  status, _, content = ask(served.port, "POST", "/v1/chat/completions", talk | {"max_tokens": 4})
  assert status == 400 and "at most 120 likeliest tokens" in content["error"]["message"]


@pytest.mark.parametrize(
  "path, form, fields",
  [
    ("/v1/completions", replies.Completion, {"prompt": "x", "logprobs": 2, "echo": True, "max_tokens": 3}),
    ("/v1/completions", replies.Completion, {"prompt": [5], "max_tokens": 0}),
    ("/v1/chat/completions", replies.ChatCompletion, {"messages": TALK, "top_logprobs": 2, "max_tokens": 3}),
  ],
)
def test_replies_have_the_form_that_the_schema_tells(served, path, form, fields):
  status, _, content = ask(served.port, "POST", path, {"model": NAME} | fields)
  assert status == 200 and json.loads(form.model_validate(content, strict=True).model_dump_json()) == content


def test_the_schema_has_this_models_bounds_and_only_what_is_answered(served):
  _, _, schema = ask(served.port, "GET", "/openapi.json")
  budget = schema["components"]["schemas"]["ComputeFields"]["properties"]["budget"]["anyOf"][0]
  assert (budget["minimum"], budget["maximum"]) == (1.0, 4.0)
  most = schema["components"]["schemas"]["ChatFields"]["properties"]["max_completion_tokens"]["anyOf"][0]
  assert most["maximum"] == CAPACITY - 1
  for path in ("/v1/completions", "/v1/chat/completions"):
    statuses = set(schema["paths"][path]["post"]["responses"])
    assert statuses == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503"}
  assert schema["components"]["schemas"]["CompletionFields"]["additionalProperties"] is False


def test_metrics_count_what_was_done(served):
  def value(name):
    lines = ask(served.port, "GET", "/metrics")[2].decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

  names = ("moe_lab_prompt_tokens_total", "moe_lab_generated_tokens_total", "moe_lab_experts_per_token_sum",
           "moe_lab_generation_flops_total", "moe_lab_time_to_first_token_seconds_count",
           'moe_lab_requests_total{endpoint="/v1/completions",status="200"}')  # fmt: skip
  before = [value(name) for name in names]
  asked = {"model": NAME, "prompt": "x", "max_tokens": 7, "temperature": 0}
  _, _, reply = ask(served.port, "POST", "/v1/completions", asked)
  prompt, tokens, experts, flops, first, requests = (value(n) - b for n, b in zip(names, before, strict=True))
  compute = reply["compute"]
  assert (prompt, tokens, first, requests) == (reply["usage"]["prompt_tokens"], 7, 1, 1)
  assert experts == pytest.approx(sum(compute["experts"]), rel=1e-4)
  assert flops == pytest.approx(7 * compute["flops_per_token"])
  assert value("moe_lab_slots_in_use") == value("moe_lab_queue_length") == 0 and value("moe_lab_healthy") == 1
  assert math.isfinite(value("process_resident_memory_bytes"))
