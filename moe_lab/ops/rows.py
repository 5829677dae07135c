"""Rows of tokens, sorted into groups (by expert, or by device) and moved there and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SortedRows(NamedTuple):
  """The pairs in use, in order of their experts and then of their tokens; R = T * K.

  Attributes:
    pair_R: int32, token * K + slot of each row; the pairs not in use come last.
    rows_E: int32, rows of each expert.
  """

  pair_R: jax.Array
  rows_E: jax.Array


class RowLayout(NamedTuple):
  """Where each (token, slot) stands in a buffer of rows, and back.

  Attributes:
    row_TK: int32; the number of rows where the slot is unused or dropped.
    token_R: int32; T where the row is empty.
  """

  row_TK: jax.Array
  token_R: jax.Array


def sort_by_expert(expert_R: jax.Array, num_experts: int) -> SortedRows:
  """Sorts the pairs by expert; those of expert E (not in use) go to the end."""
  pairs = expert_R.size
  rows_E = jnp.bincount(expert_R, length=num_experts).astype(jnp.int32)
  if (num_experts + 1) * pairs < 2**32:
    # Expert and pair in one number: a plain sort of it takes a third of a stable sort of two arrays.
    key_R = expert_R.astype(jnp.uint32) * pairs + jnp.arange(pairs, dtype=jnp.uint32)
    pair_R = (jax.lax.sort(key_R, is_stable=False) % pairs).astype(jnp.int32)
  else:
    pair_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
  return SortedRows(pair_R, rows_E)


def cut(pair_R: jax.Array, rows_E: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
  """Spreads sorted groups to C rows each: what does not fit is left out, what is too short filled up.

  Args:
    pair_R: pairs, one group after the other.
    rows_E: int32, rows of each group.
    capacity: C.

  Returns:
    pair_R and used_R (bool) of the E * C rows.
  """
  rank_EC = jnp.broadcast_to(jnp.arange(capacity), (rows_E.size, capacity))
  place_EC = (jnp.cumsum(rows_E) - rows_E)[:, None] + rank_EC
  return pair_R.at[place_EC.reshape(-1)].get(mode="clip"), (rank_EC < rows_E[:, None]).reshape(-1)


def lay_out(pair_R: jax.Array, used_R: jax.Array, num_tokens: int, slots: int) -> RowLayout:
  """The layout of rows that hold the given pairs, where used."""
  row_TK = jnp.full(num_tokens * slots, pair_R.size, jnp.int32)
  row_TK = row_TK.at[jnp.where(used_R, pair_R, row_TK.size)].set(jnp.arange(pair_R.size), mode="drop")
  return RowLayout(row_TK.reshape(num_tokens, slots), jnp.where(used_R, pair_R // slots, num_tokens))


def gate_of_row(gate_TK: jax.Array, pair_R: jax.Array, used_R: jax.Array) -> jax.Array:
  """Returns gate_R, zero where not used."""
  # Rows that are not used must not share a pair with one that is: the gradient adds without order.
  pair_R = jnp.where(used_R, pair_R, gate_TK.size + jnp.arange(pair_R.size))
  return gate_TK.reshape(-1).at[pair_R].get(mode="fill", fill_value=0, unique_indices=True)


# The two movements are each other's transpose. Spelt out, both directions are
# gathers; left to autodiff, one of them would be a scatter-add, in no fixed
# order on GPU.


@jax.custom_vjp
def to_rows(x_TD: jax.Array, layout: RowLayout) -> jax.Array:
  """x_RD: each row its token's value, zeros where empty."""
  return x_TD.at[layout.token_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_tokens(y_RD: jax.Array, layout: RowLayout) -> jax.Array:
  """y_TD: each token the sum of its rows."""
  return sum(y_RD.at[layout.row_TK[:, slot]].get(mode="fill", fill_value=0) for slot in range(layout.row_TK.shape[1]))


to_rows.defvjp(lambda x, layout: (to_rows(x, layout), layout), lambda layout, dy: (to_tokens(dy, layout), None))
to_tokens.defvjp(lambda y, layout: (to_tokens(y, layout), layout), lambda layout, dx: (to_rows(dx, layout), None))
