// What a step of decoding computes for a few rows: attention over rings of keys and values, and logits. Both are bound by
// memory, so it is read once and in order.
//
// Letters as in moe_lab/types.py, and W, slots of a ring: the key of position p lies in slot p mod W. In attention a
// thread takes neighbouring KV groups of one sequence, which lie in a row slot by slot; all of them if there are
// sequences enough.

#include <algorithm>
#include <cmath>

#include "binding.h"
#include "gemm.h"
#include "parallel.h"

namespace moe_lab {
namespace {

constexpr int64_t kSmall = 1 << 16;  // products below which waking a thread takes longer than the work

// to[n * stride] = x[n] . w for kCount rows of x; w is read once.
template <int kCount>
inline void dots(const float* x, const float* w, int64_t D, float* to, int64_t stride) {
  Vec sums[kCount] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    const Vec right = load(w + d);
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) sums[n] += load(x + n * D + d) * right;
  }
  for (int n = 0; n < kCount; ++n) {
    float total = sum(sums[n]);
    for (int64_t rest = d; rest < D; ++rest) total += x[n * D + rest] * w[rest];
    to[n * stride] = total;
  }
}

inline float dot(const float* a, const float* b, int64_t n) {
  float total;
  dots<1>(a, b, n, &total, 1);
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
  const int64_t H = k_BWMH.dimensions()[3], N = q_BNH.dimensions()[1], G = N / M;
  const int64_t most = window.typed_data()[0] > 0 ? std::min<int64_t>(W, window.typed_data()[0]) : W;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));

  // Groups of a sequence that a thread takes at a time.
  const int64_t parts = std::min(M, std::max<int64_t>(1, 2 * pool.num_threads() / B)), width = (M + parts - 1) / parts;

  auto one_part = [&](int64_t index) {
    thread_local Scratch scratch;
    const int64_t b = index / parts, m0 = index % parts * width, m1 = std::min(M, m0 + width), end = end_B.typed_data()[b];
    if (m0 >= m1) return;
    const float* q = q_BNH.typed_data() + b * N * H;
    float* out = out_BNH->typed_data() + b * N * H;
    std::fill(out + m0 * G * H, out + m1 * G * H, 0.0f);
    const int64_t first = std::max<int64_t>(end - most, 0), count = end - first, padded = round_up(count, kLanes);
    if (count <= 0) return;
    float* logits = scratch.get((m1 - m0) * G * padded) - m0 * G * padded;  // [N, keys], from head m0 * G on
    for (int64_t i = 0, slot = first % W; i < count; ++i, slot = slot + 1 == W ? 0 : slot + 1) {
      const float *k = k_BWMH.typed_data() + (b * W + slot) * M * H, distance = static_cast<float>(count - 1 - i);
      for (int64_t m = m0; m < m1; ++m) {
        const float bias = slope_M.typed_data()[m] * distance;
        for (int64_t n = m * G; n < (m + 1) * G; ++n) logits[n * padded + i] = scale * dot(q + n * H, k + m * H, H) - bias;
      }
    }
    for (int64_t n = m0 * G; n < m1 * G; ++n) {
      const float share = 1.0f / exponentials(logits + n * padded, count);
      for (int64_t i = 0; i < count; ++i) logits[n * padded + i] *= share;
    }
    for (int64_t i = 0, slot = first % W; i < count; ++i, slot = slot + 1 == W ? 0 : slot + 1) {
      const float* v = v_BWMH.typed_data() + (b * W + slot) * M * H;
      for (int64_t n = m0 * G; n < m1 * G; ++n) add_scaled(logits[n * padded + i], v + n / G * H, H, out + n * H);
    }
  };

  int64_t keys = 0;
  for (int64_t b = 0; b < B; ++b) keys += std::min<int64_t>(most, std::max<int64_t>(end_B.typed_data()[b], 0));
  if (2 * keys * N * H < kSmall) {
    for (int64_t index = 0; index < B * parts; ++index) one_part(index);
  } else {
    parallel_for(pool, B * parts, one_part);
  }
  return ffi::Error::Success();
}

ffi::Error logits_step(ffi::ThreadPool pool, Floats x_TD, Floats w_VD, ffi::Result<Floats> y_TV) {
  constexpr int64_t kWords = 128;  // that a thread takes at a time
  const int64_t T = x_TD.dimensions()[0], D = x_TD.dimensions()[1], V = w_VD.dimensions()[0];
  const float *x = x_TD.typed_data(), *w = w_VD.typed_data();
  float* y = y_TV->typed_data();
  parallel_for(pool, (V + kWords - 1) / kWords, [&](int64_t block) {
    for (int64_t v = block * kWords; v < std::min(V, (block + 1) * kWords); ++v) {
      int64_t t = 0;
      for (; t + 8 <= T; t += 8) dots<8>(x + t * D, w + v * D, D, y + t * V + v, V);
      for (; t < T; ++t) dots<1>(x + t * D, w + v * D, D, y + t * V + v, V);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moe_lab

MOE_LAB_KERNEL(attention_step, attention_step);
MOE_LAB_KERNEL(logits_step, logits_step);
