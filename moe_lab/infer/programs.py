"""The programs of generation: a chunk of some prompts, and some steps of decoding."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lab.infer.sampling import TOP, Sampling, argmax, likeliest, sample
from moe_lab.nn.transformer import Output, Transformer, head
from moe_lab.ops import native
from moe_lab.routing.base import Caps


class Slots(NamedTuple):
  """The device's memory of the sequences, [B].

  Attributes:
    token: int32, the last one, which is not in the cache yet.
    position: int32, where it belongs.
    drawn: int32, tokens drawn so far.
    left: int32, tokens still to draw; 0: nothing is decoded in this slot.
    stop: int32, id that ends the sequence.
    budget: float32, mean experts asked for.
    experts: int32, most experts of a token.
    top: int32, so many of the likeliest tokens are wanted beside each drawn one.
    sampling: settings.
  """

  token: jax.Array
  position: jax.Array
  drawn: jax.Array
  left: jax.Array
  stop: jax.Array
  budget: jax.Array
  experts: jax.Array
  top: jax.Array
  sampling: Sampling


class Made(NamedTuple):
  """Tokens: ids, log-probabilities in nats, mean experts over layers, and whether there is one at all.

  And the TOP likeliest beside each: ids and log-probabilities, where a sequence wants them.
  """

  token: jax.Array
  log_prob: jax.Array
  experts: jax.Array
  there: jax.Array
  top_token: jax.Array
  top_log_prob: jax.Array


class Scores(NamedTuple):
  """What a model makes of a prompt's own tokens, [R, L]; of the padding, anything.

  Attributes:
    log_prob: of the token that follows, in nats.
    greedy: bool, whether that is the likeliest.
    top_token, top_log_prob: the TOP likeliest, where a sequence wants them.
  """

  log_prob: jax.Array
  greedy: jax.Array
  top_token: jax.Array
  top_log_prob: jax.Array


class Chunk(NamedTuple):
  """A part of R prompts, to be read at a time.

  Attributes:
    token_RL: int32.
    next_RL: int32, the token that follows each.
    length_R: int32, real tokens; the others are padding.
    offset_R: int32, position of the first.
    slot_R: int32, where each sequence lives.
    last_R: bool, whether the prompt ends here and the sequence starts to decode.
    entry_R: what then becomes of the slot.
  """

  token_RL: jax.Array
  next_RL: jax.Array
  length_R: jax.Array
  offset_R: jax.Array
  slot_R: jax.Array
  last_R: jax.Array
  entry_R: Slots


def free_slots(num: int) -> Slots:
  """Returns slots in which nothing is decoded."""

  def ints():
    return jnp.zeros(num, jnp.int32)

  def floats():
    return jnp.zeros(num)

  sampling = Sampling(floats(), ints(), floats(), floats(), ints())
  return Slots(ints(), ints(), ints(), ints(), ints(), floats(), ints(), ints(), sampling)


def _after_drawing(slots: Slots, token_B: jax.Array) -> Slots:
  left_B = jnp.where(token_B == slots.stop, 0, slots.left - 1)
  return slots._replace(token=token_B, drawn=slots.drawn + 1, left=left_B)


def _logits(model: Transformer, out: Output, row_T, column_T) -> jax.Array:
  """Returns logits_TV, float32, at a few places of the output."""
  hidden_TD = out.hidden_BLD[row_T, column_T]
  if model.mesh is None and hidden_TD.dtype == jnp.float32 and native.used_here():
    # XLA's product of so few rows runs at half the memory's speed.
    (logits_TV,) = native.call("logits_step", [(hidden_TD.shape[0], out.head_VD.shape[0])], hidden_TD, out.head_VD)
    return logits_TV
  return head(hidden_TD, out.head_VD)


def _scores(out: Output, chunk: Chunk) -> Scores:
  """Returns what the model makes of the tokens that follow."""
  logits_RLV = head(out.hidden_BLD, out.head_VD)
  log_prob_RL = jnp.take_along_axis(logits_RLV, chunk.next_RL[..., None], axis=-1)[..., 0]
  log_prob_RL = log_prob_RL - jax.nn.logsumexp(logits_RLV, axis=-1)
  shape = chunk.token_RL.shape
  top = likeliest(logits_RLV.reshape(-1, logits_RLV.shape[-1]), jnp.any(chunk.entry_R.top > 0))
  return Scores(log_prob_RL, argmax(logits_RLV) == chunk.next_RL, *(values.reshape(*shape, -1) for values in top))


class Inputs(NamedTuple):
  """What the layers are given besides parameters, the router's state and the cache; as in `Transformer`."""

  token_BL: jax.Array
  segment_BL: jax.Array
  budget_B: jax.Array
  caps: Caps
  offset: jax.Array
  row_B: jax.Array | None


def inputs_of_chunk(rows: int | None, chunk: Chunk) -> Inputs:
  """Returns what is computed to read a chunk; `rows`: most expert rows of a layer, None: no bound."""
  segment_RL = (jnp.arange(chunk.token_RL.shape[1]) < chunk.length_R[:, None]).astype(jnp.int32)
  caps = Caps(chunk.entry_R.experts, rows)
  return Inputs(chunk.token_RL, segment_RL, chunk.entry_R.budget, caps, chunk.offset_R, chunk.slot_R)


def inputs_of_step(rows: int | None, slots: Slots) -> Inputs:
  """Returns what is computed to decode a token in each slot that has tokens left."""
  active_B1 = (slots.left > 0)[:, None].astype(jnp.int32)
  return Inputs(slots.token[:, None], active_B1, slots.budget, Caps(slots.experts, rows), slots.position, None)


def _apply(model: Transformer, params, router_state, cache, inputs: Inputs) -> Output:
  return model.apply(
    {"params": params}, inputs.token_BL, inputs.segment_BL, inputs.budget_B, router_state,
    caps=inputs.caps, cache=cache, offset=inputs.offset, row_B=inputs.row_B,
  )  # fmt: skip


def read(model: Transformer, rows: int | None, scored: bool, params, router_state, cache, slots: Slots, chunk: Chunk):
  """Reads a chunk; sequences whose prompt ends draw their first token.

  Args:
    model: unrolled.
    rows: most expert rows of a layer; None: no bound.
    scored: whether the prompt's own tokens are scored.
    params, router_state: of the model.
    cache: of all slots.
    slots: all.
    chunk: what to read.

  Returns:
    cache, slots, and `Made` [R], the experts of the chunk's tokens, mean over layers [R, L], and `Scores` or None.
  """
  out = _apply(model, params, router_state, cache, inputs_of_chunk(rows, chunk))
  return out.cache, *after_chunk(model, scored, out, slots, chunk)


def after_chunk(model: Transformer, scored: bool, out: Output, slots: Slots, chunk: Chunk):
  """Returns what `read` does but for the cache, of what the layers gave."""
  num, length = chunk.token_RL.shape
  end_R = jnp.maximum(chunk.length_R - 1, 0)
  logits_RV = _logits(model, out, jnp.arange(num), end_R)
  experts_RL = out.stats.count_T.reshape(-1, num, length).astype(jnp.float32).mean(0)
  token_R, log_prob_R = sample(logits_RV, chunk.entry_R.drawn, chunk.entry_R.sampling)
  place_R = jnp.where(chunk.last_R, chunk.slot_R, slots.token.size)
  entry_R = _after_drawing(chunk.entry_R, token_R)
  slots = jax.tree.map(lambda old_B, new_R: old_B.at[place_R].set(new_R, mode="drop"), slots, entry_R)
  top = likeliest(logits_RV, jnp.any(chunk.last_R & (chunk.entry_R.top > 0)))
  made = Made(token_R, log_prob_R, experts_RL[jnp.arange(num), end_R], chunk.last_R, *top)
  return slots, (made, experts_RL, _scores(out, chunk) if scored else None)


def nothing_made(model: Transformer, steps: int, num: int) -> Made:
  """Returns the record of so many steps of `num` slots, without a token."""
  shape = steps, num
  top_shape = (*shape, min(TOP, model.config.data.vocab_size))
  return Made(
    *(jnp.zeros(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32, bool)),
    *(jnp.zeros(top_shape, dtype) for dtype in (jnp.int32, jnp.float32)),
  )


def only_live(slots: Slots, live_B) -> Slots:
  """Returns slots in which nothing is left to draw where they are not `live_B`."""
  return slots._replace(left=jnp.where(live_B, slots.left, 0))


def after_step(model: Transformer, out: Output, slots: Slots, made: Made, step) -> tuple[Slots, Made]:
  """Draws a token in each slot that has tokens left, of what the layers gave, and puts it down as that of `step`."""
  active_B = slots.left > 0
  logits_BV = _logits(model, out, jnp.arange(active_B.size), 0)
  token_B, log_prob_B = sample(logits_BV, slots.drawn, slots.sampling)
  top = likeliest(logits_BV, jnp.any(active_B & (slots.top > 0)))
  new = Made(token_B, log_prob_B, out.stats.count_T.astype(jnp.float32).mean(0), active_B, *top)
  made = jax.tree.map(lambda all_nB, new_B: all_nB.at[step].set(new_B), made, new)
  moved = _after_drawing(slots._replace(position=slots.position + 1), token_B)
  return jax.tree.map(functools.partial(jnp.where, active_B), moved, slots), made


def decode(model: Transformer, rows: int | None, steps: int, params, router_state, cache, slots: Slots, live_B):
  """Draws up to `steps` tokens in each slot that is `live_B`. Returns cache, slots, and `Made` [steps, B].

  Other arguments as in `read`.
  """

  def one(carry):
    step, cache, slots, made = carry
    out = _apply(model, params, router_state, cache, inputs_of_step(rows, slots))
    return step + 1, out.cache, *after_step(model, out, slots, made, step)

  def go_on(carry):
    return (carry[0] < steps) & jnp.any(carry[2].left > 0)

  made = nothing_made(model, steps, live_B.size)
  _, cache, slots, made = jax.lax.while_loop(go_on, one, (jnp.int32(0), cache, only_live(slots, live_B), made))
  return cache, slots, made
