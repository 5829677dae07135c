"""The engine gives every request what the full forward pass says, whoever else is served."""

import functools

import jax
import numpy as np
import pytest

from moe_lab.errors import UserError
from moe_lab.infer.engine import Engine
from moe_lab.infer.request import Request
from tests.infer.models import CONFIGS, VOCAB, forward, make


@functools.cache
def engine(name, **arguments):
  settings = dict(slots=3, capacity=256, chunk=16, steps=4, decode=lambda tokens: "".join(chr(97 + t) for t in tokens))
  return Engine(*make(name), **settings | arguments)


def prompt(length, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def responses(served, requests):
  """Returns the tokens of each request."""
  made = [[] for _ in requests]
  for index, token in served.generate(requests):
    made[index].append(token)
  assert not served.busy
  return made


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_greedy_decoding_equals_the_full_forward_pass(name):
  # Five requests on three slots; prompts end within a chunk and at its end, and responses wrap the first ring.
  requests = [Request(prompt(n, n), max_tokens=m) for n, m in ((1, 90), (16, 12), (33, 3), (13, 30), (100, 1))]
  for request, made in zip(requests, responses(engine(name), requests), strict=True):
    length, tokens = len(request.prompt), [token.token for token in made]
    assert len(made) == request.max_tokens and [t.finish for t in made] == [None] * (len(made) - 1) + ["length"]
    out = forward(name)([*request.prompt, *tokens, *[0] * (256 - length - len(tokens))])
    after = out.logits_BLV[0, length - 1 : length - 1 + len(tokens)]
    np.testing.assert_array_equal(after.argmax(-1), tokens)
    log_prob = np.asarray(jax.nn.log_softmax(after))[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose([t.log_prob for t in made], log_prob, atol=1e-5)
    count = out.stats.count_T.mean(0)[length - 1 : length - 1 + len(tokens)]
    np.testing.assert_allclose([t.experts for t in made], count, rtol=1e-6)


def test_chunks_as_they_are_shipped_go_round_the_rings():
  # Rings of 192 slots and 448: a prompt of 600 in chunks of 128 goes round both, by the kernel where there is one.
  served = engine("windowed", capacity=704, chunk=128, slots=1)
  [made] = responses(served, [Request(prompt(600), 6)])
  out = forward("windowed")([*prompt(600), *(token.token for token in made[:-1])])
  np.testing.assert_array_equal(out.logits_BLV[0, 599:].argmax(-1), [token.token for token in made])


def test_nobody_waits_for_a_compiler_once_the_engine_is_warm(caplog):
  config, params, state = make("topk_rotary_dense")
  placed = jax.device_put(params, jax.devices()[0])  # as weights from a checkpoint are
  served = Engine(config, placed, state, slots=5, capacity=128, chunk=48, steps=2)

  def compiled():
    caplog.clear()
    # A short prompt alone, a long one, one whose end is short, several of both, scores, and all who decode.
    lengths = [5], [48], [50], [3, 2], [40, 3, 70, 33, 7]
    with jax.log_compiles():
      for together in lengths:
        responses(served, [Request(prompt(n), 3) for n in together])
      responses(served, [Request(prompt(9), 3, log_probs_from=1)])
    return [r.message for r in caplog.records if r.message.startswith(("Compiling jit(read)", "Compiling jit(decode)"))]

  with jax.log_compiles():
    served.warm_up()
  assert len([r for r in caplog.records if r.message.startswith("Compiling jit(")]) >= 6  # or they are told otherwise
  assert not compiled()


def test_a_response_does_not_depend_on_the_others():
  mine = Request(prompt(20), 40, temperature=1.0, top_p=0.95, min_p=0.01, seed=5, budget=2.5)
  others = [Request(prompt(n, n), 25, temperature=2.0, seed=n, budget=1 + n / 20) for n in (3, 40, 18)]
  [alone] = responses(engine("windowed"), [mine])
  together = responses(engine("windowed"), [others[0], mine, *others[1:]])
  assert [t.token for t in alone] == [t.token for t in together[1]]
  np.testing.assert_allclose([t.log_prob for t in alone], [t.log_prob for t in together[1]], atol=1e-5)
  [again] = responses(engine("windowed"), [Request(mine.prompt, 40, temperature=1.0, seed=6)])
  assert [t.token for t in alone] != [t.token for t in again]


def test_requests_join_while_others_decode():
  served = engine("windowed")
  first = served.submit(Request(prompt(4), 60))
  seen = [ticket for ticket, _ in served.step()]
  second = served.submit(Request(prompt(5), 8))
  while served.busy:
    seen += [ticket for ticket, _ in served.step()]
  assert seen.index(second) < len(seen) - 1 - seen[::-1].index(second) < len(seen) - 1 and seen[-1] == first
  assert seen.count(first) == 60 and seen.count(second) == 8


def test_stop_strings_and_stop_tokens():
  served = engine("windowed")
  request = Request(prompt(9), 30, temperature=1.0, seed=3)
  [free] = responses(served, [request])
  text = "".join(t.text for t in free)
  assert text == "".join(chr(97 + t.token) for t in free)
  stop = text[5:8]  # over three tokens, within two rounds of four steps
  [stopped] = responses(served, [Request(request.prompt, 30, temperature=1.0, seed=3, stop=("~~", stop))])
  assert "".join(t.text for t in stopped) == text[: text.index(stop)] and stopped[-1].finish == "stop"
  assert [t.token for t in stopped] == [t.token for t in free][: text.index(stop) + 3]
  [by_token] = responses(served, [Request(request.prompt, 30, temperature=1.0, seed=3, stop_token=free[6].token)])
  first = [t.token for t in free].index(free[6].token)
  assert len(by_token) == first + 1 and by_token[-1].finish == "stop"
  # Whoever takes the slot next is not stopped.
  [again] = responses(served, [request])
  assert [t.token for t in again] == [t.token for t in free]


def test_a_budget_and_a_cap_are_each_requests_own():
  requests = [Request(prompt(20), 6, budget=b, max_experts=m) for b, m in ((1.0, None), (4.0, None), (4.0, 2))]
  few, many, capped = (np.array([t.experts for t in made]) for made in responses(engine("windowed"), requests))
  assert many.mean() > few.mean() and many.max() > 2 >= capped.max() and capped.min() >= 1


@pytest.mark.parametrize("name", ["windowed", "topk_rotary_dense"])
def test_prompts_are_scored_from_a_token_on(name):
  # Within the first chunk of 16 tokens, from a chunk's edge on, in the third, and nothing but what was drawn.
  asked = [(40, 1, 3), (40, 16, 0), (40, 17, 2), (50, 37, 20), (1, 1, 0), (33, 33, 1)]
  requests = [Request(prompt(n, n), max_tokens=2, log_probs_from=start, top=top) for n, start, top in asked]
  for request, made in zip(requests, responses(engine(name), requests + [Request(prompt(60), 9)]), strict=False):
    tokens, start = request.prompt, request.log_probs_from
    found = made[0].prompt
    assert made[1].prompt is None
    out = forward(name)([*tokens, *[0] * (256 - len(tokens))])
    log_prob_LV = np.asarray(jax.nn.log_softmax(out.logits_BLV[0]))
    np.testing.assert_allclose(found.experts, out.stats.count_T.mean(0)[: len(tokens)], rtol=1e-6)
    scored_LV = log_prob_LV[start - 1 : len(tokens) - 1]
    np.testing.assert_allclose(found.log_prob, scored_LV[np.arange(len(scored_LV)), tokens[start:]], atol=1e-5)
    np.testing.assert_array_equal(found.greedy, scored_LV.argmax(-1) == tokens[start:])
    assert len(found.top) == len(found.log_prob) and {len(top) for top in [*found.top, made[1].top]} == {request.top}
    for row_V, top in zip([*scored_LV, log_prob_LV[len(tokens) - 1]], [*found.top, made[0].top], strict=True):
      np.testing.assert_array_equal([token for token, _ in top], np.argsort(-row_V, stable=True)[: request.top])
      np.testing.assert_allclose([value for _, value in top], np.sort(row_V)[::-1][: request.top], atol=1e-5)


def test_the_likeliest_beside_each_drawn_token():
  asked = Request(prompt(20), 12, temperature=1.5, seed=3, top=4)
  [made, others] = responses(engine("windowed"), [asked, Request(prompt(9), 12)])
  out = forward("windowed")([*asked.prompt, *(token.token for token in made[:-1])])
  for row_V, token in zip(jax.nn.log_softmax(out.logits_BLV[0, 19:]), made, strict=True):
    np.testing.assert_array_equal([other for other, _ in token.top], np.argsort(-row_V, stable=True)[:4])
    np.testing.assert_allclose([value for _, value in token.top], np.sort(row_V)[::-1][:4], atol=1e-5)
  assert all(token.top == () for token in others)


def test_a_request_is_forgotten_wherever_it_is():
  served = engine("windowed", slots=2, capacity=128)
  [alone] = responses(served, [Request(prompt(40), 20)])
  tickets = [served.submit(Request(prompt(40, seed), 20)) for seed in (0, 1, 2, 3, 0)]
  assert (served.num_serving, served.num_waiting) == (0, 5)
  made = served.step()
  assert (served.num_serving, served.num_waiting) == (2, 3) and {ticket for ticket, _ in made} == set(tickets[:2])
  served.cancel(tickets[1])  # which decodes
  served.cancel(tickets[2])  # which waits
  served.cancel(tickets[2])
  assert (served.num_serving, served.num_waiting) == (1, 2)
  while served.busy:
    made += served.step()
  of = {ticket: [token for other, token in made if other == ticket] for ticket in tickets}
  assert len(of[tickets[1]]) < 20 and not of[tickets[2]] and len(of[tickets[3]]) == 20
  for ticket in (tickets[0], tickets[4]):  # who was beside it, and who took its slot
    assert [token.token for token in of[ticket]] == [token.token for token in alone]


def test_steady_bounds_the_rows_and_leaves_everybody_an_expert():
  # The untrained policy takes four experts at a budget of four: twelve rows, where 3 * 1.5, rounded up, are allowed.
  requests = [Request(prompt(10, n), 20, budget=4.0) for n in range(3)]
  assert np.mean([t.experts for made in responses(engine("windowed"), requests) for t in made]) > 3
  served = engine("windowed", steps=1, steady=True, budget=1.5)
  for request in requests:
    served.submit(request)
  most = 0
  while served.busy:
    decoded = dict(served.step())  # each sequence's last token
    assert min(token.experts for token in decoded.values()) >= 1
    most = max(most, sum(token.experts for token in decoded.values()))
  assert most == 5


def test_the_cache_is_smaller_than_a_full_one():
  served = engine("windowed", capacity=4096)
  # Windows of 46, 319, 2210 and 15 more: rings of 64, 384, 2240 and 4096 of 4 * 4096 slots.
  assert served.cache_bytes / served.full_cache_bytes == (64 + 384 + 2240 + 4096) / (4 * 4096)


def test_who_comes_and_goes_quickly_does_not_keep_others_from_decoding():
  served = engine("windowed")
  long = served.submit(Request(prompt(4), 12))
  served.step()
  for n in range(12):
    served.submit(Request(prompt(3, n), 1))
  first = served.step()
  # Two slots are free: one token of each of two newcomers, and a round of four for the one that decodes.
  assert [ticket for ticket, _ in first].count(long) == 4 and len(first) == 6
  while served.busy:
    served.step()


def test_an_engine_serves_on_after_a_break_and_after_a_refusal():
  served, request = engine("windowed"), Request(prompt(9), 30)
  [whole] = responses(served, [request])
  begun = served.generate([request, Request(prompt(4), 5)])
  next(begun)
  with pytest.raises(ValueError, match="`submit` and `step`"):
    served.submit(request)
  begun.close()
  with pytest.raises(UserError, match="max_tokens=999"):
    next(served.generate([request, Request([1], max_tokens=999)]))
  [again] = responses(served, [request])
  assert [t.token for t in again] == [t.token for t in whole]


@pytest.mark.parametrize(
  ("request_", "words"),
  [
    (Request([]), "prompt: wanted at least one token"),
    (Request([VOCAB]), "prompt: wanted ids from 0 to 39"),
    (Request([-1]), "prompt: wanted ids from 0 to 39"),
    (Request([1], max_tokens=0), "max_tokens=0: wanted a number from 1"),
    (Request([1], max_tokens=256), "max_tokens=256: wanted at most 255 with a prompt of 1"),
    (Request([1], max_experts=0), "max_experts=0: wanted a number from 1"),
    (Request([1], max_experts=10**10), "max_experts=10000000000: wanted a number from 1"),
    (Request([1], top_k=10**10), "top_k=10000000000: wanted a number from 0"),
    (Request([1], temperature=float("nan")), "temperature=nan: wanted a number from 0"),
    (Request([1], budget=float("nan")), "budget=nan: wanted a number from 1 to 4"),
    (Request([1], budget=99), "budget=99: wanted a number from 1 to 4"),
    (Request([1], seed=-1), "seed=-1: wanted a number from 0"),
    (Request([1], stop=("",)), 'stop="": wanted text'),
    (Request([1], top=21), "top=21: wanted a number from 0 to 20"),
    (Request([1, 2], log_probs_from=0), "log_probs_from=0: wanted a number from 1 to 2"),
    (Request([1], stop_token=10**12), "stop_token=1000000000000: wanted a number from -1 to 39"),
  ],
)
def test_what_cannot_be_served_is_refused(request_, words):
  with pytest.raises(UserError, match=words):
    engine("windowed").submit(request_)
