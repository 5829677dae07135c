// Causal grouped-query attention with ALiBi slopes and documents, forward and backward (FlashAttention, arXiv
// 2205.14135): the logits of one tile of queries and one block of keys at a time, in the first cache.
//
// Letters as in moe_lab/types.py: B batch, L queries, S keys, N query heads, M KV heads, G = N / M, H head width. Key s
// stands at position s, query l at offset + l. Tiles that causality hides are not computed, nor are those whose keys
// belong to other documents or lie beyond the window of their KV group (ops/alibi.py): a query at position p has to look
// at keys (p - window, p] only.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "binding.h"
#include "gemm.h"
#include "parallel.h"

namespace moe_lab {
namespace {

constexpr int64_t kKeys = kBlock;             // keys of a block
constexpr int64_t kQueries = 32 * kRows;      // queries that a thread takes at a time in the forward pass
constexpr int64_t kBackwardQueries = 8 * kRows;
constexpr float kMasked = -1e30f;             // finite, so that a row without keys gives numbers and not NaN

struct Shape {
  int64_t B, L, S, N, M, H;
  int64_t G() const { return N / M; }
  int64_t padded_H() const { return round_up(H, kColumns); }
};

struct Inputs {
  Shape shape;
  const float *q, *k, *v, *slope_M;
  const int32_t *segment_BL, *segment_BS, *window_M;
  int64_t offset;

  Inputs(const Floats& q, const Floats& k, const Floats& v, const Floats& slope, const Ints& segment_q,
         const Ints& segment_k, const Ints& offset, const Ints& window)
      : shape{q.dimensions()[0], q.dimensions()[1], k.dimensions()[1],
              q.dimensions()[2], k.dimensions()[2], q.dimensions()[3]},
        q(q.typed_data()), k(k.typed_data()), v(v.typed_data()), slope_M(slope.typed_data()),
        segment_BL(segment_q.typed_data()), segment_BS(segment_k.typed_data()), window_M(window.typed_data()),
        offset(offset.typed_data()[0]) {}

  // Element h = 0 of a row of q (or of what has its shape) and of k or v.
  int64_t query(int64_t b, int64_t l, int64_t n) const { return ((b * shape.L + l) * shape.N + n) * shape.H; }
  int64_t key(int64_t b, int64_t s, int64_t m) const { return ((b * shape.S + s) * shape.M + m) * shape.H; }
};

// The range of the documents of some tokens. Sets whose ranges lie apart share none, in whatever order documents come.
struct Documents {
  int32_t least = std::numeric_limits<int32_t>::max(), greatest = std::numeric_limits<int32_t>::min();

  Documents() = default;
  Documents(const int32_t* segments, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      least = std::min(least, segments[i]);
      greatest = std::max(greatest, segments[i]);
    }
  }
  bool apart(const Documents& other) const { return greatest < other.least || other.greatest < least; }
};

// The documents of the panels of a block of keys.
struct KeyDocuments {
  Documents panels[kKeys / kColumns];

  KeyDocuments(const int32_t* segments, int64_t count) {
    for (int64_t j = 0; j < count; j += kColumns) {
      panels[j / kColumns] = Documents(segments + j, std::min<int64_t>(kColumns, count - j));
    }
  }
  // Narrows the keys [from, to), whole panels, to those between the first and the last panel that may hold one seen.
  void narrow(const Documents& seen, int64_t& from, int64_t& to) const {
    while (from < to && panels[from / kColumns].apart(seen)) from += kColumns;
    while (from < to && panels[to / kColumns - 1].apart(seen)) to -= kColumns;
  }
  bool apart(const Documents& other) const {
    int64_t from = 0, to = kKeys;
    narrow(other, from, to);
    return from >= to;
  }
};

// Lays rows (`stride` apart) out in panels of `rows` rows, which serve as a right factor and as a left one.
void put_panels(const float* from, int64_t stride, int64_t count, int64_t H, int64_t rows, float* panels) {
  for (int64_t h = 0; h < H; h += kColumns) pack(from, stride, count, H, h, panels + h * rows);
}

// The logits of a tile of queries against a panel of keys: scaled, biased, masked.
struct Logits {
  float scale, slope;
  const int32_t* segment_S;  // of the keys, from key 0 of the batch entry
  int64_t num_keys;

  // `dot` holds q.k of one query at `position` in document `segment` with keys [first, first + kColumns).
  void operator()(const float* dot, int64_t position, int32_t segment, int64_t first, Vec* logits) const {
    for (int v = 0; v < 2; ++v) {
      const int64_t start = first + v * kLanes;
      int32_t padded[kLanes];
      const int32_t* segments = segment_S + start;
      if (start + kLanes > num_keys) {
        for (int i = 0; i < kLanes; ++i) padded[i] = start + i < num_keys ? segments[i] : 0;
        segments = padded;
      }
      const IntVec distance = splat(static_cast<int32_t>(position - start)) - iota();
      const IntVec seen = (distance >= 0) & (load(segments) == splat(segment));
      const Vec logit = load(dot + v * kLanes) * scale - slope * __builtin_convertvector(distance, Vec);
      logits[v] = select(seen, logit, splat(kMasked));
    }
  }
};

// Keys of a block, from `first` on, that the query at `position` or an earlier one sees, in whole panels.
int64_t seen_keys(int64_t position, int64_t first) {
  return std::clamp<int64_t>(round_up(position - first + 1, kColumns), 0, kKeys);
}

// Keys of a block that no query from `position` on has in its window, in whole panels.
int64_t passed_keys(int64_t position, int64_t window, int64_t first) {
  return std::clamp<int64_t>(position - window + 1 - first, 0, kKeys) / kColumns * kColumns;
}

void forward_task(const Inputs& in, int64_t b, int64_t n, int64_t query0, float* out, float* log_denominator_BNL) {
  thread_local Scratch scratch;
  const Shape& shape = in.shape;
  const int64_t H = shape.H, padded_H = shape.padded_H(), m = n / shape.G();
  const int64_t queries = std::min(kQueries, shape.L - query0), rows = round_up(queries, kRows);
  float* q = scratch.get(2 * rows * padded_H + 2 * kKeys * padded_H + kRows * kStride + 2 * rows);
  float *sums = q + rows * padded_H, *keys = sums + rows * padded_H, *values = keys + kKeys * padded_H;
  float *weights = values + kKeys * padded_H, *highest = weights + kRows * kStride, *denominator = highest + rows;
  put_panels(in.q + in.query(b, query0, n), shape.N * H, queries, H, rows, q);
  std::fill(sums, sums + rows * padded_H, 0.0f);
  std::fill(highest, highest + rows, kMasked);
  std::fill(denominator, denominator + rows, 0.0f);
  const int32_t *segment_L = in.segment_BL + b * shape.L + query0, *segment_S = in.segment_BS + b * shape.S;
  const Logits logits_of{1.0f / std::sqrt(static_cast<float>(H)), in.slope_M[m], segment_S, shape.S};
  const Documents of_queries(segment_L, queries);
  Tile tile;

  const int64_t window = in.window_M[m], last = std::min(shape.S - 1, in.offset + query0 + queries - 1);
  const int64_t first_seen = std::max<int64_t>(in.offset + query0 - window + 1, 0) / kColumns * kColumns;
  for (int64_t first = first_seen; first <= last; first += kKeys) {
    const int64_t count = std::min(kKeys, shape.S - first);
    const KeyDocuments of_keys(segment_S + first, count);
    if (of_keys.apart(of_queries)) continue;
    const float *k = in.k + in.key(b, first, m), *v = in.v + in.key(b, first, m);
    for (int64_t j = 0; j < count; j += kColumns) pack_transposed(k, shape.M * H, H, count, j, keys + j * H);
    for (int64_t h = 0; h < H; h += kColumns) {
      pack(v, shape.M * H, count, H, h, values + h * kKeys);
      std::fill(values + h * kKeys + count * kColumns, values + (h + kColumns) * kKeys, 0.0f);
    }
    for (int64_t i = 0; i < queries; i += kRows) {
      const int64_t tile_rows = std::min<int64_t>(kRows, queries - i), position = in.offset + query0 + i;
      int64_t seen = std::min(seen_keys(position + tile_rows - 1, first), round_up(count, kColumns));
      int64_t passed = passed_keys(position, window, first);
      of_keys.narrow(Documents(segment_L + i, tile_rows), passed, seen);
      if (seen <= passed) continue;
      for (int64_t j = passed; j < seen; j += kColumns) {
        multiply_panels(H, q + i * kColumns, rows, keys + j * H, tile);
        for (int64_t r = 0; r < tile_rows; ++r) {
          Vec logits[2];
          logits_of(tile.at[r], position + r, segment_L[i + r], first + j, logits);
          store(weights + r * kStride + j, logits[0]);
          store(weights + r * kStride + j + kLanes, logits[1]);
        }
      }
      float scale[kRows] = {};
      for (int64_t r = 0; r < tile_rows; ++r) {
        float* row = weights + r * kStride;
        Vec top = splat(highest[i + r]);
        for (int64_t j = passed; j < seen; j += kLanes) top = select(load(row + j) > top, load(row + j), top);
        const float new_highest = largest(top);
        Vec total{};
        for (int64_t j = passed; j < seen; j += kLanes) {
          const Vec logit = load(row + j);
          const Vec weight = select(logit > 0.1f * kMasked, exp(logit - new_highest), splat(0.0f));
          total += weight;
          store(row + j, weight);
        }
        scale[r] = std::exp(highest[i + r] - new_highest);
        denominator[i + r] = denominator[i + r] * scale[r] + sum(total);
        highest[i + r] = new_highest;
      }
      for (int64_t h = 0; h < H; h += kColumns) {
        multiply_block(seen - passed, weights + passed, values + h * kKeys + passed * kColumns, tile);
        float* to = sums + h * rows + i * kColumns;
        for (int64_t r = 0; r < tile_rows; ++r, to += kColumns) {
          for (int j = 0; j < kColumns; j += kLanes) store(to + j, load(to + j) * scale[r] + load(tile.at[r] + j));
        }
      }
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const float total = std::max(denominator[i], 1e-30f);
    float* row = out + in.query(b, query0 + i, n);
    for (int64_t h = 0; h < H; ++h) row[h] = sums[h / kColumns * kColumns * rows + i * kColumns + h % kColumns] / total;
    log_denominator_BNL[(b * shape.N + n) * shape.L + query0 + i] = highest[i] + std::log(total);
  }
}

// Some keys of one KV head, [key0, key1), for the backward pass: tasks of a head each add to a dq of their own.
struct Part {
  int64_t b, m, key0, key1, work;
  float* dq_LGH;      // of the head's queries
  int64_t dq_stride;  // from one query to the next
};

// dk and dv of a part's keys, and their share of dq of all query heads of the KV head.
void backward_task(const Inputs& in, const Part& part, const float* d_out, const float* log_denominator_BNL,
                   const float* correction_BNL, float* dk, float* dv) {
  thread_local Scratch scratch;
  const Shape& shape = in.shape;
  const int64_t H = shape.H, padded_H = shape.padded_H(), G = shape.G(), b = part.b, m = part.m;
  float* keys = scratch.get(5 * kKeys * padded_H + 2 * kBackwardQueries * (padded_H + kStride));
  float *keys_HS = keys + kKeys * padded_H, *values_HS = keys_HS + kKeys * padded_H;
  float *dk_sum = values_HS + kKeys * padded_H, *dv_sum = dk_sum + kKeys * padded_H;
  float *q = dv_sum + kKeys * padded_H, *d_out_rows = q + kBackwardQueries * padded_H;
  float *weights = d_out_rows + kBackwardQueries * padded_H, *d_logits = weights + kBackwardQueries * kStride;
  const int32_t *segment_L = in.segment_BL + b * shape.L, *segment_S = in.segment_BS + b * shape.S;
  const Logits logits_of{1.0f / std::sqrt(static_cast<float>(H)), in.slope_M[m], segment_S, shape.S};
  const int64_t window = in.window_M[m];
  Tile tile, d_tile;

  for (int64_t first = part.key0; first < part.key1; first += kKeys) {
    const int64_t count = std::min(kKeys, part.key1 - first), stride = shape.M * H;
    const float *k = in.k + in.key(b, first, m), *v = in.v + in.key(b, first, m);
    for (int64_t j = 0; j < count; j += kColumns) {
      pack_transposed(k, stride, H, count, j, keys_HS + j * H);
      pack_transposed(v, stride, H, count, j, values_HS + j * H);
    }
    for (int64_t h = 0; h < H; h += kColumns) {
      pack(k, stride, count, H, h, keys + h * kKeys);
      std::fill(keys + h * kKeys + count * kColumns, keys + (h + kColumns) * kKeys, 0.0f);
    }
    const KeyDocuments of_keys(segment_S + first, count);
    std::fill(dk_sum, dk_sum + 2 * kKeys * padded_H, 0.0f);
    // Earlier queries see none of these keys, later ones have none in their window.
    const int64_t first_query = std::clamp<int64_t>(first - in.offset, 0, shape.L) / kRows * kRows;
    const int64_t end_query = std::clamp<int64_t>(first + count - 1 + window - in.offset, 0, shape.L);
    for (int64_t g = 0; g < G; ++g) {
      const int64_t n = m * G + g, at_L = (b * shape.N + n) * shape.L;
      for (int64_t query0 = first_query; query0 < end_query; query0 += kBackwardQueries) {
        const int64_t queries = std::min(kBackwardQueries, end_query - query0);
        const Documents of_queries(segment_L + query0, queries);
        if (of_keys.apart(of_queries)) continue;
        put_panels(in.q + in.query(b, query0, n), shape.N * H, queries, H, kBackwardQueries, q);
        put_panels(d_out + in.query(b, query0, n), shape.N * H, queries, H, kBackwardQueries, d_out_rows);
        int64_t seen_by_last = 0;
        for (int64_t i = 0; i < queries; i += kRows) {
          const int64_t tile_rows = std::min<int64_t>(kRows, queries - i), position = in.offset + query0 + i;
          const int64_t seen = std::min(seen_keys(position + tile_rows - 1, first), round_up(count, kColumns));
          const int64_t passed = std::min(passed_keys(position, window, first), seen);
          seen_by_last = seen;
          int64_t begin = passed, end = seen;
          of_keys.narrow(Documents(segment_L + query0 + i, tile_rows), begin, end);
          for (int64_t j = begin; j < end; j += kColumns) {
            multiply_panels(H, q + i * kColumns, kBackwardQueries, keys_HS + j * H, tile);
            multiply_panels(H, d_out_rows + i * kColumns, kBackwardQueries, values_HS + j * H, d_tile);
            for (int64_t r = 0; r < tile_rows; ++r) {
              const int64_t l = query0 + i + r, to = (i + r) * kStride + j;
              Vec logits[2];
              logits_of(tile.at[r], position + r, segment_L[l], first + j, logits);
              for (int v = 0; v < 2; ++v) {
                const Vec weight = exp(logits[v] - log_denominator_BNL[at_L + l]);
                const Vec d_weight = load(d_tile.at[r] + v * kLanes);
                store(weights + to + v * kLanes, weight);
                store(d_logits + to + v * kLanes, weight * (d_weight - correction_BNL[at_L + l]) * logits_of.scale);
              }
            }
          }
          // The tiles of keys below take in what was narrowed away, and may reach a panel further on both sides.
          for (int64_t r = 0; r < tile_rows; ++r) {
            const int64_t row = (i + r) * kStride, before = std::min<int64_t>(kColumns, passed);
            const int64_t after = std::min<int64_t>(kColumns, kStride - seen);
            for (float* to : {weights + row, d_logits + row}) {
              std::fill_n(to + passed - before, before + begin - passed, 0.0f);
              std::fill_n(to + end, seen - end + after, 0.0f);
            }
          }
          if (begin >= end) continue;
          for (int64_t h = 0; h < H; h += kColumns) {
            const int64_t from = i * kStride + begin;
            multiply_block(end - begin, d_logits + from, keys + h * kKeys + begin * kColumns, tile);
            const int64_t width = std::min<int64_t>(kColumns, H - h);
            for (int64_t r = 0; r < tile_rows; ++r) {
              float* to = part.dq_LGH + (query0 + i + r) * part.dq_stride + g * H + h;
              for (int64_t j = 0; j < width; ++j) to[j] += tile.at[r][j];
            }
          }
        }
        for (int64_t j = 0; j < std::min(count, seen_by_last); j += kRows) {
          if (Documents(segment_S + first + j, std::min<int64_t>(kRows, count - j)).apart(of_queries)) continue;
          // The first row of queries, in whole tiles, that sees key j.
          const int64_t row0 = std::max<int64_t>(first + j - in.offset - query0, 0) / kRows * kRows;
          if (row0 >= queries) break;
          // And the first, likewise, that has passed it: see `passed_keys`.
          const int64_t past = round_up(j + kRows, kColumns) + first + window - 1 - in.offset - query0;
          const int64_t rows = std::min(queries, round_up(std::max<int64_t>(past, 0), kRows)) - row0;
          if (rows <= 0) continue;
          for (int64_t h = 0; h < H; h += kColumns) {
            const int64_t from = row0 * kStride + j, right = h * kBackwardQueries + row0 * kColumns;
            multiply_columns(rows, d_logits + from, q + right, tile);
            multiply_columns(rows, weights + from, d_out_rows + right, d_tile);
            float *dk_to = dk_sum + h * kKeys + j * kColumns, *dv_to = dv_sum + h * kKeys + j * kColumns;
            for (int64_t e = 0; e < std::min<int64_t>(kRows, kKeys - j) * kColumns; e += kLanes) {
              store(dk_to + e, load(dk_to + e) + load(tile.at[0] + e));
              store(dv_to + e, load(dv_to + e) + load(d_tile.at[0] + e));
            }
          }
        }
      }
    }
    for (int64_t s = 0; s < count; ++s) {
      const int64_t to = in.key(b, first + s, m);
      for (int64_t h = 0; h < H; ++h) {
        const int64_t from = h / kColumns * kColumns * kKeys + s * kColumns + h % kColumns;
        dk[to + h] = dk_sum[from];
        dv[to + h] = dv_sum[from];
      }
    }
  }
}

// The KV heads, cut so that none is more than one of `least` equal shares of all the work: a head that sees everything,
// beside others with a window, would keep one thread busy long after the rest. Their dq is not set.
std::vector<Part> parts_of(const Inputs& in, int64_t least) {
  const Shape& shape = in.shape;
  const int64_t blocks = (shape.S + kKeys - 1) / kKeys, end = in.offset + shape.L;
  const auto work = [&](int64_t m, int64_t key0, int64_t key1) {  // pairs of queries and keys, block by block
    int64_t pairs = 0;
    for (int64_t first = key0; first < key1; first += kKeys) {
      pairs += std::clamp<int64_t>(end - first, 0, std::min<int64_t>(in.window_M[m], shape.L)) * kKeys;
    }
    return pairs;
  };
  int64_t total = 0;
  for (int64_t m = 0; m < shape.M; ++m) total += shape.B * work(m, 0, shape.S);
  std::vector<Part> parts;
  for (int64_t b = 0; b < shape.B; ++b) {
    for (int64_t m = 0; m < shape.M; ++m) {
      const int64_t share = (work(m, 0, shape.S) * least + total - 1) / std::max<int64_t>(total, 1);
      const int64_t cuts = std::clamp<int64_t>(share, 1, blocks);
      for (int64_t i = 0; i < cuts; ++i) {
        const int64_t key0 = blocks * i / cuts * kKeys, key1 = std::min(blocks * (i + 1) / cuts * kKeys, shape.S);
        parts.push_back({b, m, key0, key1, work(m, key0, key1), nullptr, 0});
      }
    }
  }
  return parts;
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats slope_M, Ints segment_BL,
                   Ints segment_BS, Ints offset, Ints window_M, ffi::Result<Floats> out,
                   ffi::Result<Floats> log_denominator_BNL) {
  const Inputs in(q, k, v, slope_M, segment_BL, segment_BS, offset, window_M);
  const int64_t parts = (in.shape.L + kQueries - 1) / kQueries, heads = in.shape.B * in.shape.N;
  parallel_for(pool, heads * parts, [&](int64_t i) {
    // The last queries, which see the most keys, first.
    const int64_t head = i % heads, part = parts - 1 - i / heads;
    forward_task(in, head / in.shape.N, head % in.shape.N, part * kQueries, out->typed_data(),
                 log_denominator_BNL->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats slope_M, Ints segment_BL,
                    Ints segment_BS, Ints offset, Ints window_M, Floats out, Floats log_denominator_BNL,
                    Floats d_out, ffi::Result<Floats> dq, ffi::Result<Floats> dk, ffi::Result<Floats> dv) {
  thread_local Scratch correction_scratch, part_scratch;
  const Inputs in(q, k, v, slope_M, segment_BL, segment_BS, offset, window_M);
  const Shape& shape = in.shape;
  const int64_t size = q.element_count();
  // Row sums of d_weights * weights: the softmax's own correction (FlashAttention, section 3.1).
  float* correction_BNL = correction_scratch.get(shape.B * shape.N * shape.L);
  parallel_for(pool, shape.B * shape.N, [&](int64_t head) {
    const int64_t b = head / shape.N, n = head % shape.N;
    for (int64_t l = 0; l < shape.L; ++l) {
      const float *o = out.typed_data() + in.query(b, l, n), *d = d_out.typed_data() + in.query(b, l, n);
      float total = 0;
      for (int64_t h = 0; h < shape.H; ++h) total += o[h] * d[h];
      correction_BNL[head * shape.L + l] = total;
    }
  });
  std::fill(dq->typed_data(), dq->typed_data() + size, 0.0f);
  std::vector<Part> parts = parts_of(in, 2 * pool.num_threads());
  const int64_t head_size = shape.L * shape.G() * shape.H;
  int64_t others = 0;
  for (const Part& part : parts) others += part.key0 > 0;
  float* other = part_scratch.get(others * head_size);
  std::fill(other, other + others * head_size, 0.0f);
  for (Part& part : parts) {
    part.dq_LGH = part.key0 ? other : dq->typed_data() + in.query(part.b, 0, part.m * shape.G());
    part.dq_stride = (part.key0 ? shape.G() : shape.N) * shape.H;
    if (part.key0) other += head_size;
  }
  // The longest first, so that none is left over at the end.
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.work > b.work; });
  parallel_for(pool, parts.size(), [&](int64_t i) {
    backward_task(in, parts[i], d_out.typed_data(), log_denominator_BNL.typed_data(), correction_BNL,
                  dk->typed_data(), dv->typed_data());
  });
  if (others) {
    constexpr int64_t kPiece = 64;  // queries
    parallel_for(pool, (shape.L + kPiece - 1) / kPiece, [&](int64_t piece) {
      for (const Part& part : parts) {
        if (part.key0 == 0) continue;
        for (int64_t l = piece * kPiece; l < std::min(shape.L, (piece + 1) * kPiece); ++l) {
          const float* from = part.dq_LGH + l * part.dq_stride;
          float* to = dq->typed_data() + in.query(part.b, l, part.m * shape.G());
          for (int64_t i = 0; i < part.dq_stride; ++i) to[i] += from[i];
        }
      }
    });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moe_lab

MOE_LAB_KERNEL(attention_forward, forward);
MOE_LAB_KERNEL(attention_backward, backward);
