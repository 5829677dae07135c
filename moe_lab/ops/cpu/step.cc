// Attention of one query a sequence over a ring of keys and values: what a step of decoding does.
//
// Letters as in moe_lab/types.py, and W, slots of the ring: the key of position p lies in slot p mod W. A thread takes
// one KV group of one sequence, whose query heads read each key once.

#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "parallel.h"

namespace moe_lab {
namespace {

constexpr int64_t kSmall = 1 << 16;  // products below which waking a thread takes longer than the work

inline float dot(const float* a, const float* b, int64_t n) {
  Vec sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load(a + i) * load(b + i);
  float total = sum(sums);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

inline void add_scaled(float scale, const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + scale * load(from + i));
  for (; i < n; ++i) to[i] += scale * from[i];
}

// logits[i] becomes e^(logits[i] - highest), zero from `count` to the next whole vector; returns the sum.
float exponentials(float* logits, int64_t count) {
  const int64_t padded = round_up(count, kLanes);
  std::fill(logits + count, logits + padded, -INFINITY);
  Vec top = load(logits);
  for (int64_t i = kLanes; i < padded; i += kLanes) top = select(load(logits + i) > top, load(logits + i), top);
  const Vec highest = splat(largest(top));
  Vec total{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec e = exp(load(logits + i) - highest);
    store(logits + i, e);
    total += e;
  }
  return sum(total);
}

ffi::Error attention_step(ffi::ThreadPool pool, Floats q_BNH, Floats k_BWMH, Floats v_BWMH, Floats slope_M, Ints end_B,
                          Ints window, ffi::Result<Floats> out_BNH) {
  const int64_t B = k_BWMH.dimensions()[0], W = k_BWMH.dimensions()[1], M = k_BWMH.dimensions()[2];
  const int64_t H = k_BWMH.dimensions()[3], N = q_BNH.dimensions()[1], G = N / M, row = M * H;
  const int64_t most = window.typed_data()[0] > 0 ? std::min<int64_t>(W, window.typed_data()[0]) : W;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));

  auto one_group = [&](int64_t index) {
    thread_local Scratch scratch;
    const int64_t b = index / M, m = index % M, end = end_B.typed_data()[b];
    const float* q = q_BNH.typed_data() + (b * N + m * G) * H;
    float* out = out_BNH->typed_data() + (b * N + m * G) * H;
    std::fill(out, out + G * H, 0.0f);
    const int64_t first = std::max<int64_t>(end - most, 0), count = end - first;
    if (count <= 0) return;
    const float slope = slope_M.typed_data()[m];
    const int64_t start = b * W * row + m * H, padded = round_up(count, kLanes);
    float* logits = scratch.get(G * padded);

    // The ring's slots in order of their positions are at most two runs.
    auto each_key = [&](const float* from_BWMH, auto&& body) {
      int64_t slot = first % W;
      for (int64_t i = 0; i < count; ++i) {
        body(i, from_BWMH + start + slot * row);
        if (++slot == W) slot = 0;
      }
    };
    each_key(k_BWMH.typed_data(), [&](int64_t i, const float* k) {
      const float bias = slope * static_cast<float>(count - 1 - i);
      for (int64_t g = 0; g < G; ++g) logits[g * padded + i] = scale * dot(q + g * H, k, H) - bias;
    });
    for (int64_t g = 0; g < G; ++g) {
      const float share = 1.0f / exponentials(logits + g * padded, count);
      for (int64_t i = 0; i < count; ++i) logits[g * padded + i] *= share;
    }
    each_key(v_BWMH.typed_data(), [&](int64_t i, const float* v) {
      for (int64_t g = 0; g < G; ++g) add_scaled(logits[g * padded + i], v, H, out + g * H);
    });
  };

  int64_t keys = 0;
  for (int64_t b = 0; b < B; ++b) keys += std::min<int64_t>(most, std::max<int64_t>(end_B.typed_data()[b], 0));
  if (2 * keys * N * H < kSmall) {
    for (int64_t index = 0; index < B * M; ++index) one_group(index);
  } else {
    parallel_for(pool, B * M, one_group);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moe_lab

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_lab_attention_step, moe_lab::attention_step,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<moe_lab::Floats>()
                                  .Arg<moe_lab::Floats>()
                                  .Arg<moe_lab::Floats>()
                                  .Arg<moe_lab::Floats>()
                                  .Arg<moe_lab::Ints>()
                                  .Arg<moe_lab::Ints>()
                                  .Ret<moe_lab::Floats>());
