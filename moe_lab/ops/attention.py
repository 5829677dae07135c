"""Causal grouped-query attention with ALiBi slopes and document boundaries.

`attention` is the one signature. Its back ends: `reference` holds the whole
L x S matrix; `blocked` (`blocked_attention.py`, plain XLA), `native` (the CPU
kernel `cpu/attention.cc`) and `tpu` (`tpu_attention.py`, Pallas) are linear in
memory, leave out the keys beyond each KV group's window, and share their
derivative. `flash` (`flash_attention.py`, cuDNN) serves training in bfloat16 on GPUs.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from moe_lab.ops import flash_attention, native, tpu_attention
from moe_lab.ops.blocked_attention import MASKED, blocked_backward, blocked_forward
from moe_lab.ops.tpu_attention import tpu_backward, tpu_forward

BLOCK, GPU_BLOCK = 64, 1024  # of `blocked`: a GPU waits for the host after each block


def reference_attention(q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, offset):
  """As `attention`, holding all logits in float32."""
  q_BLMGH = rearrange(q_BLNH, "B L (M G) H -> B L M G H", M=k_BSMH.shape[2])
  logits = jnp.einsum("BLMGH,BSMH->BMGLS", q_BLMGH, k_BSMH, preferred_element_type=jnp.float32)
  logits *= q_BLNH.shape[-1] ** -0.5
  distance_LS = offset + jnp.arange(q_BLNH.shape[1])[:, None] - jnp.arange(k_BSMH.shape[1])[None, :]
  logits -= slope_M[:, None, None, None] * distance_LS.astype(jnp.float32)
  seen_BLS = (distance_LS >= 0) & (segment_BL[:, :, None] == segment_BS[:, None, :])
  weights = jax.nn.softmax(jnp.where(seen_BLS[:, None, None], logits, MASKED), axis=-1)
  out = jnp.einsum("BMGLS,BSMH->BLMGH", weights.astype(v_BSMH.dtype), v_BSMH, preferred_element_type=jnp.float32)
  return rearrange(out, "B L M G H -> B L (M G) H").astype(q_BLNH.dtype)


def _limits(window_M: Sequence[int | None]) -> jax.Array:
  """The windows as the CPU kernel takes them: int32, as large as they come where there is none."""
  most = np.iinfo(np.int32).max
  return jnp.asarray([most if window is None else min(window, most) for window in window_M], jnp.int32)


def native_forward(*inputs, window_M: Sequence[int | None]):
  """As `blocked_forward`, by the CPU kernel, in float32."""
  native.register()
  q_BLNH = inputs[0]
  batch, length, heads, _ = q_BLNH.shape
  shapes = q_BLNH.shape, (batch, heads, length)
  out_BLNH, log_denominator_BNL = native.call("attention_forward", shapes, *inputs, _limits(window_M))
  return out_BLNH.astype(q_BLNH.dtype), log_denominator_BNL


def native_backward(*inputs_and_outputs, window_M: Sequence[int | None]):
  """As `blocked_backward`."""
  shapes = [x.shape for x in inputs_and_outputs[:3]]
  inputs, outputs = inputs_and_outputs[:7], inputs_and_outputs[7:]
  gradients = native.call("attention_backward", shapes, *inputs, _limits(window_M), *outputs)
  return tuple(d.astype(x.dtype) for d, x in zip(gradients, inputs, strict=False))


def _run(backend: str, functions: dict[str, Callable], *arrays):
  """Calls one of the functions. `auto` is decided when it is lowered, which may be for another machine than this."""
  if backend != "auto":
    return functions[backend](*arrays)
  choice = {"tpu": functions["tpu"]}
  if native.used_here():
    choice["cpu"] = functions["native"]
  return jax.lax.platform_dependent(*arrays, default=functions["blocked"], **choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(backend: str, block: int, window_M: tuple[int | None, ...], *inputs):
  return _attend_forward(backend, block, window_M, *inputs)[0]


def _attend_forward(backend, block, window_M, *inputs):
  functions = {
    "blocked": functools.partial(blocked_forward, block=block, window_M=window_M),
    "native": functools.partial(native_forward, window_M=window_M),
    "tpu": functools.partial(tpu_forward, window_M=window_M),
  }
  out_BLNH, log_denominator_BNL = _run(backend, functions, *inputs)
  return out_BLNH, (*inputs, out_BLNH, log_denominator_BNL)


def _attend_backward(backend, block, window_M, saved, d_out_BLNH):
  functions = {
    "blocked": functools.partial(blocked_backward, block=block, window_M=window_M),
    "native": functools.partial(native_backward, window_M=window_M),
    "tpu": functools.partial(tpu_backward, window_M=window_M),
  }
  dq_BLNH, dk_BSMH, dv_BSMH = _run(backend, functions, *saved, d_out_BLNH)
  # Slopes are constants, segments and offset integers: no gradient.
  return dq_BLNH, dk_BSMH, dv_BSMH, jnp.zeros_like(saved[3]), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attention(
  q_BLNH: jax.Array,
  k_BSMH: jax.Array,
  v_BSMH: jax.Array,
  slope_M: jax.Array,
  segment_BL: jax.Array,
  segment_BS: jax.Array,
  *,
  offset: jax.Array | int = 0,
  window_M: tuple[int | None, ...] | None = None,
  backend: str = "auto",
  block: int = 0,
) -> jax.Array:
  """softmax(q.k / sqrt(H) - slope * distance) over earlier keys of the same document.

  Args:
    q_BLNH: queries; heads of one KV group are neighbours: n = m * G + g.
    k_BSMH: keys; key s stands at position s.
    v_BSMH: values.
    slope_M: float32, logit per token of distance, by KV group (ALiBi, arXiv 2108.12409).
    segment_BL: int32, the document of each query.
    segment_BS: int32, the document of each key.
    offset: position of the first query (0 in training; the cache's fill in decoding).
    window_M: how many keys a query of each KV group has to look at, itself included (`alibi.windows`); None, of a group
      or altogether: all. Blocks of keys beyond it are skipped, others are not cut: a wrong window changes the result,
      a right one does not. The reference, which is the definition, looks at everything.
    backend: reference | blocked | native (CPU) | tpu | flash (GPU) | auto: for few queries and for one block the
      reference; for more, native on CPU where it can be built, tpu on TPU, flash on GPU where it serves, blocked
      elsewhere.
    block: rows and columns of a block of `blocked`; 0: what suits the device.

  Returns:
    [B, L, N, H], in the queries' dtype.

  Raises:
    ConfigError: the back end was chosen, and there is no such machine here.
  """
  window_M = window_M or (None,) * k_BSMH.shape[2]
  block = block or (GPU_BLOCK if jax.default_backend() == "gpu" else BLOCK)
  arguments = (q_BLNH, k_BSMH, v_BSMH, slope_M, segment_BL, segment_BS, jnp.asarray(offset, jnp.int32))
  if backend == "auto":
    few, logits = q_BLNH.shape[1] <= min(block, BLOCK), q_BLNH.shape[1] * k_BSMH.shape[1]
    if not few and flash_attention.serves(q_BLNH, k_BSMH):
      backend = "flash"
    elif few or logits <= block**2:
      backend = "reference"
  if backend == "reference":
    return reference_attention(*arguments)
  if backend == "tpu":
    tpu_attention.check_here()
  if backend in ("auto", "blocked", "native", "tpu"):
    return _attend(backend, block, window_M, *arguments)
  if backend == "flash":
    flash_attention.check_here(q_BLNH, k_BSMH)
    return flash_attention.flash_attention(*arguments[:5], window_M=window_M)
  raise ValueError(f"attention backend {backend!r}: wanted auto, reference, blocked, native, tpu or flash")
