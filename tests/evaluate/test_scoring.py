"""Asking a model: the numbers of its plain forward pass, and what each answer cost, counted by hand."""

import numpy as np
import pytest

from moe_lab.errors import UserError
from moe_lab.evaluate.compute import Meter
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.evaluate.scoring import Scorer
from moe_lab.infer.engine import Engine
from moe_lab.nn.attention import layer_windows
from tests.infer.models import VOCAB, forward, make

CONTEXT = 24


class Letters:
  """A tokenizer whose ids from 4 on are characters; "ab" is one token."""

  bos_id, eos_id, begins_texts = 2, 3, True

  def encode(self, text):
    return np.array([4 if part == "\0" else 5 + ord(part) % (VOCAB - 5) for part in text.replace("ab", "\0")], np.int32)

  def decode(self, ids):
    return "".join("ab" if token == 4 else chr(92 + token) for token in ids if token > 3)


@pytest.fixture(scope="module")
def scorer():
  config, params, state = make("windowed")
  made = []

  def engine(capacity):
    made.append(capacity)
    return Engine(config, params, state, slots=3, capacity=64, chunk=8, decode=Letters().decode, budget=2.0)

  scorer = Scorer(config, Letters(), engine, CONTEXT)
  scorer.made = made
  return scorer


def expected(context, continuation, budget=2.0):
  """Returns log-probability, greedy and experts [tokens] of the plain forward pass."""
  tokens = [*context, *continuation][-(CONTEXT + 1) :]
  # Always the same length, so that it is compiled once; later tokens change nothing before them.
  out = forward("windowed")([*tokens, *[0] * (CONTEXT + 1 - len(tokens))], budget)
  logits_LV = np.asarray(out.logits_BLV, np.float64)[0]
  log_prob_LV = logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))
  places = range(len(tokens) - len(continuation) - 1, len(tokens) - 1)
  log_prob = sum(log_prob_LV[place, tokens[place + 1]] for place in places)
  greedy = all(log_prob_LV[place].argmax() == tokens[place + 1] for place in places)
  experts = np.asarray(out.stats.count_T, np.float64).reshape(2, -1).mean(0)[: len(tokens) - 1]
  return log_prob, greedy, experts


def draw(rng, length):
  return rng.integers(4, VOCAB, length).tolist()


def test_log_likelihoods_are_those_of_the_forward_pass(scorer):
  rng = np.random.default_rng(0)
  pairs = [(draw(rng, n), draw(rng, m)) for n, m in ((1, 1), (5, 3), (20, 4), (22, 3), (40, 2), (3, CONTEXT))]
  best = np.asarray(forward("windowed")([*pairs[1][0], *[0] * 20]).logits_BLV)[0, 4].argmax()
  pairs.append((pairs[1][0], [int(best)]))
  found = scorer.log_likelihoods(pairs)
  for (context, continuation), scored in zip(pairs, found, strict=True):
    log_prob, greedy, experts = expected(context, continuation)
    assert scored.log_prob == pytest.approx(log_prob, abs=1e-4) and scored.greedy == greedy
    compute = scored.compute
    assert (compute.prompt_tokens, compute.answer_tokens) == (len(experts) - len(continuation), len(continuation))
    assert compute.prompt_experts == pytest.approx(experts[: -len(continuation)].sum())
    assert compute.answer_experts == pytest.approx(experts[-len(continuation) :].sum())
  assert found[-1].greedy and not found[0].greedy
  with pytest.raises(UserError, match="--context=24: wanted at least 25"):
    scorer.log_likelihoods([([4], [5] * 25)])


def test_a_budget_reaches_the_engine(scorer, monkeypatch):
  asked = []
  serve = scorer._serve
  monkeypatch.setattr(scorer, "_serve", lambda requests, what: asked.extend(requests) or serve(requests, what))
  scorer.log_likelihoods([([4], [5]), ([4], [6]), ([4, 5], [6, 7])], budget=2.0)
  scorer.write([[4]], [{"max_tokens": 1, "budget": 2.0}])
  assert [request.budget for request in asked] == [2.0] * 3


def test_choices_of_one_token_are_read_once(scorer, monkeypatch):
  rng = np.random.default_rng(1)
  context, other, far = draw(rng, 9), draw(rng, 11), draw(rng, 30)
  # All tokens of the vocabulary, so that some are not among the likeliest; the others have contexts of their own.
  pairs = [(context, [token]) for token in range(VOCAB)] + [(other, [7]), (far, [8]), (far, [9])]
  requests = []
  serve = scorer._serve
  monkeypatch.setattr(scorer, "_serve", lambda asked, what: requests.extend(asked) or serve(asked, what))
  found = scorer.log_likelihoods(pairs)
  for (context, continuation), scored in zip(pairs, found, strict=True):
    log_prob, greedy, _ = expected(context, continuation)
    assert scored.log_prob == pytest.approx(log_prob, abs=1e-4) and scored.greedy == greedy
  assert 1 < len(requests) < len(pairs) - 15  # 20 of 40 are found by one reading
  assert sum(scored.greedy for scored in found[:VOCAB]) == 1
  # One of those found together is charged for the reading, the others for nothing.
  charged = [scored.compute.prompt_tokens + scored.compute.answer_tokens for scored in found[:VOCAB]]
  assert charged.count(0) == 19 and set(charged) == {0, 9}


def test_writing_on_is_greedy_decoding_and_what_it_cost(scorer):
  rng = np.random.default_rng(2)
  prompts, made = [draw(rng, n) for n in (1, 4, 40)], 6
  written = scorer.write(prompts, [{"max_tokens": made}] * 3)
  for prompt, one in zip(prompts, written, strict=True):
    tokens = prompt[-(CONTEXT - made) :]
    first = len(tokens)
    for _ in range(made):
      logits_LV = np.asarray(forward("windowed")([*tokens, *[0] * (CONTEXT + 1 - len(tokens))]).logits_BLV)[0]
      tokens = [*tokens, int(logits_LV[len(tokens) - 1].argmax())]
      if tokens[-1] == Letters.eos_id:
        break
    assert one.text == Letters().decode(tokens[first:])
    _, _, experts = expected(tokens[:first], tokens[first:])
    assert (one.compute.prompt_tokens, one.compute.answer_tokens) == (first - 1, len(tokens) - first)
    assert one.compute.answer_experts == pytest.approx(experts[first - 1 :].sum())
  with pytest.raises(UserError, match="--context=24: wanted more than 24"):
    scorer.write([[4]], [{"max_tokens": 24}])


def test_a_text_is_cut_as_a_whole_and_spaces_go_with_what_follows(scorer):
  encode = Letters().encode
  assert scorer.pair("q: ", "c") == ([2, *encode("q:")], encode(" c").tolist())
  # "ab" would swallow the border: then the continuation is cut by itself.
  assert scorer.pair("qa", "b") == ([2, *encode("qa")], encode("b").tolist())
  assert scorer.pair("q", "ab") == ([2, *encode("q")], [4])


def test_flops_by_hand():
  config, _, _ = make("windowed")
  meter = Meter(config, 500)
  assert layer_windows(config.model)[0] == 46
  experts = np.full(200, 1.5)
  one = meter.count(experts, 190)
  windows = [window or 10**9 for window in layer_windows(config.model)]
  keys = sum(min(t + 1, window) for t in range(200) for window in windows) / len(windows) / 200
  parts = forward_flops_per_token(config, 1.5, keys)
  # All tokens, but the head for ten only.
  assert one.flops == pytest.approx(200 * (parts["total"] - parts["head"]) + 10 * parts["head"])
  assert one.report()["mean_experts"] == 1.5 and (one + one).report() == one.report() | {"tokens": 400}
  assert meter.count(experts, 200).report()["answer_experts"] is None
