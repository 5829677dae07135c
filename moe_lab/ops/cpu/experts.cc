// SwiGLU experts: sort, gather, products, gates and combination in one call, forward and backward.
//
// Rows are sorted by expert and worked on in chunks that stay in the second
// cache. Every result has one writer, and sums are taken in a fixed order, so
// results do not depend on which thread did what.
//
// Letters as in moe_lab/types.py: T tokens, K slots, E experts, D width, F
// hidden width, R rows in use.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "binding.h"
#include "gemm.h"
#include "parallel.h"

namespace moe_lab {
namespace {

constexpr int64_t kChunkBytes = 2048 * 1024;  // of one chunk's rows: large enough that packing the weights pays, small enough for a cache
constexpr int64_t kFewRows = 3;              // up to so many, packing the weights would cost more than the products

struct Weights {
  const float *gate, *up, *down;  // [E, D, F], [E, D, F], [E, F, D]
  int64_t D, F;
};

// The (token, slot) pairs in use, sorted by expert and then by token.
struct Rows {
  std::vector<int32_t> pair_R, row_TK;  // -1: the pair is not in use
  std::vector<int64_t> start_E1;

  Rows(const int32_t* expert_TK, int64_t pairs, int64_t E) : row_TK(pairs, -1), start_E1(E + 1, 0) {
    for (int64_t p = 0; p < pairs; ++p) {
      if (used(expert_TK[p], E)) ++start_E1[expert_TK[p] + 1];
    }
    std::partial_sum(start_E1.begin(), start_E1.end(), start_E1.begin());
    pair_R.resize(start_E1[E]);
    std::vector<int64_t> next(start_E1.begin(), start_E1.end() - 1);
    for (int64_t p = 0; p < pairs; ++p) {
      if (!used(expert_TK[p], E)) continue;
      row_TK[p] = next[expert_TK[p]]++;
      pair_R[row_TK[p]] = p;
    }
  }
  static bool used(int32_t expert, int64_t E) { return expert >= 0 && expert < E; }
};

// A range of one expert's rows: what a thread takes at a time.
struct Item {
  int64_t expert, first, last;
  int64_t part;  // which of the expert's ranges
  int64_t rows() const { return last - first; }
};

// Splits experts that have more rows than a fair share of a thread's work; the largest items come first.
std::vector<Item> items_of(const Rows& rows, int64_t threads) {
  const int64_t E = rows.start_E1.size() - 1;
  const int64_t limit = std::max<int64_t>(512, rows.pair_R.size() / (4 * threads) + 1);
  std::vector<Item> items;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t first = rows.start_E1[e], count = rows.start_E1[e + 1] - first, parts = (count + limit - 1) / limit;
    for (int64_t p = 0; p < parts; ++p) {
      items.push_back({e, first + count * p / parts, first + count * (p + 1) / parts, p});
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.rows() > b.rows(); });
  return items;
}

// Rows of a chunk: an even share of the item's, in whole tiles.
int64_t chunk_rows(int64_t rows, int64_t floats_per_row) {
  const int64_t most = std::max<int64_t>(kChunkBytes / (4 * floats_per_row) / kRows, 4) * kRows;
  const int64_t chunks = (rows + most - 1) / most;
  return round_up((rows + chunks - 1) / chunks, kRows);
}

// Writes the part of a tile that lies within [rows, columns] of a row-major matrix.
template <bool kAdd>
void put_tile(const Tile& tile, int64_t rows, int64_t columns, float* to, int64_t stride) {
  for (int64_t i = 0; i < std::min<int64_t>(rows, kRows); ++i, to += stride) {
    if (columns >= kColumns) {
      for (int v = 0; v < kColumns; v += kLanes) {
        store(to + v, kAdd ? load(to + v) + load(tile.at[i] + v) : load(tile.at[i] + v));
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) to[j] = kAdd ? to[j] + tile.at[i][j] : tile.at[i][j];
    }
  }
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// y[t] = sum over slots of gate * row; gate_TK null: 1.
void combine(ffi::ThreadPool& pool, const Rows& rows, const float* y_RD, const float* gate_TK, int64_t K, int64_t D,
             float* y_TD) {
  constexpr int64_t kTokens = 64;
  const int64_t T = rows.row_TK.size() / K;
  parallel_for(pool, (T + kTokens - 1) / kTokens, [&](int64_t block) {
    for (int64_t t = block * kTokens; t < std::min(T, (block + 1) * kTokens); ++t) {
      float* y = y_TD + t * D;
      std::fill(y, y + D, 0.0f);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = rows.row_TK[t * K + k];
        if (row < 0) continue;
        const float gate = gate_TK ? gate_TK[t * K + k] : 1.0f;
        for (int64_t d = 0; d < D; ++d) y[d] += gate * y_RD[row * D + d];
      }
    }
  });
}

// A few rows, straight from the weights as they lie.
void few_rows(const Weights& w, const Item& item, const Rows& rows, const float* x_TD, int64_t K, float* y_RD,
              Scratch& scratch) {
  const int64_t D = w.D, F = w.F;
  float* pre = scratch.get(2 * F);
  for (int64_t r = item.first; r < item.last; ++r) {
    const float* x = x_TD + rows.pair_R[r] / K * D;
    float *up = pre + F, *y = y_RD + r * D;
    std::fill(pre, pre + 2 * F, 0.0f);
    for (int64_t d = 0; d < D; ++d) {
      const float *gate_F = w.gate + (item.expert * D + d) * F, *up_F = w.up + (item.expert * D + d) * F;
      for (int64_t f = 0; f < F; ++f) pre[f] += x[d] * gate_F[f];
      for (int64_t f = 0; f < F; ++f) up[f] += x[d] * up_F[f];
    }
    for (int64_t f = 0; f < F; ++f) pre[f] *= up[f] / (1.0f + std::exp(-pre[f]));
    std::fill(y, y + D, 0.0f);
    for (int64_t f = 0; f < F; ++f) {
      const float* down_D = w.down + (item.expert * F + f) * D;
      for (int64_t d = 0; d < D; ++d) y[d] += pre[f] * down_D[d];
    }
  }
}

void forward_item(const Weights& w, const Item& item, const Rows& rows, const float* x_TD, int64_t K, float* y_RD) {
  thread_local Scratch scratch;
  if (item.rows() <= kFewRows) return few_rows(w, item, rows, x_TD, K, y_RD, scratch);
  const int64_t D = w.D, F = w.F, padded_F = round_up(F, kColumns);
  const int64_t most = chunk_rows(item.rows(), num_blocks(D) * kStride + padded_F);
  const int64_t x_size = left_size(most, D), panel_size = std::max(2 * D, padded_F) * kColumns;
  float* x = scratch.get(x_size + most * padded_F + panel_size);
  float *hidden = x + x_size, *panel = hidden + most * padded_F;
  const float *gate_DF = w.gate + item.expert * D * F, *up_DF = w.up + item.expert * D * F;
  const float* down_FD = w.down + item.expert * F * D;
  const int64_t block_size = most * kStride;
  Tile pre, up;
  for (int64_t first = item.first; first < item.last; first += most) {
    const int64_t count = std::min(most, item.last - first);
    for (int64_t i = 0; i < count; ++i) put_row(x_TD + rows.pair_R[first + i] / K * D, D, i, most, x);
    for (int64_t f = 0; f < F; f += kColumns) {
      pack(gate_DF, F, D, F, f, panel);
      pack(up_DF, F, D, F, f, panel + D * kColumns);
      for (int64_t i = 0; i < count; i += kRows) {
        multiply_rows(D, x + i * kStride, block_size, panel, pre);
        multiply_rows(D, x + i * kStride, block_size, panel + D * kColumns, up);
        float* to = hidden + f * most + i * kColumns;
        for (int j = 0; j < kRows * kColumns; j += kLanes) {
          const Vec g = load(pre.at[0] + j);
          store(to + j, g * sigmoid(g) * load(up.at[0] + j));
        }
      }
    }
    for (int64_t d = 0; d < D; d += kColumns) {
      pack(down_FD, D, F, D, d, panel);
      for (int64_t i = 0; i < count; i += kRows) {
        multiply_panels(F, hidden + i * kColumns, most, panel, pre);
        put_tile<false>(pre, count - i, D - d, y_RD + (first + i) * D + d, D);
      }
    }
  }
}

// What the backward pass writes; d_gate_R by row, the weights' at the item's own place.
struct Gradients {
  float *dx_RD, *d_gate_R, *gate, *up, *down;
};

void backward_item(const Weights& w, const Item& item, const Rows& rows, const float* x_TD, const float* dy_TD,
                   const float* gate_TK, int64_t K, const Gradients& out) {
  thread_local Scratch scratch;
  const int64_t D = w.D, F = w.F, padded_F = round_up(F, kColumns);
  const int64_t most = chunk_rows(item.rows(), 2 * num_blocks(D) * kStride + 3 * padded_F);
  const int64_t left = left_size(most, D), panels = most * padded_F, block_size = most * kStride;
  const int64_t panel_size = std::max(3 * D, 2 * padded_F) * kColumns;
  float* x = scratch.get(2 * left + 3 * panels + panel_size + most * kLanes + D * F);
  // `d_pre` and `d_up` follow each other: together they are the left factor of dx.
  float *dy = x + left, *d_pre = dy + left, *d_up = d_pre + panels, *gated = d_up + panels;
  float *panel = gated + panels, *d_gate = panel + panel_size, *d_down_DF = d_gate + most * kLanes;
  const float *gate_DF = w.gate + item.expert * D * F, *up_DF = w.up + item.expert * D * F;
  const float* down_FD = w.down + item.expert * F * D;
  Tile pre_tile, up_tile, d_tile;

  for (int64_t first = item.first; first < item.last; first += most) {
    const int64_t count = std::min(most, item.last - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = rows.pair_R[first + i] / K;
      put_row(x_TD + token * D, D, i, most, x);
      put_row(dy_TD + token * D, D, i, most, dy);
    }
    std::fill(d_gate, d_gate + most * kLanes, 0.0f);
    // The hidden activations are computed again: two of eleven products, against writing and reading them all.
    for (int64_t f = 0; f < F; f += kColumns) {
      pack(gate_DF, F, D, F, f, panel);
      pack(up_DF, F, D, F, f, panel + D * kColumns);
      pack_transposed(down_FD, D, D, F, f, panel + 2 * D * kColumns);
      for (int64_t i = 0; i < count; i += kRows) {
        multiply_rows(D, x + i * kStride, block_size, panel, pre_tile);
        multiply_rows(D, x + i * kStride, block_size, panel + D * kColumns, up_tile);
        multiply_rows(D, dy + i * kStride, block_size, panel + 2 * D * kColumns, d_tile);
        for (int64_t r = i; r < std::min(i + kRows, count); ++r) {
          const float gate = gate_TK[rows.pair_R[first + r]];
          Vec d_gate_sum = load(d_gate + r * kLanes);
          for (int j = 0; j < kColumns; j += kLanes) {
            const Vec pre = load(pre_tile.at[r - i] + j), up = load(up_tile.at[r - i] + j);
            const Vec d_ungated = load(d_tile.at[r - i] + j), d_hidden = d_ungated * gate;
            const Vec s = sigmoid(pre), act = pre * s, hidden = act * up;
            // y = gate * (hidden down): its product with dy is the gate's gradient, without computing y again.
            d_gate_sum += d_ungated * hidden;
            const int64_t at = f * most + r * kColumns + j;
            store(d_pre + at, d_hidden * up * (s + act * (1.0f - s)));
            store(d_up + at, d_hidden * act);
            store(gated + at, hidden * gate);
          }
          store(d_gate + r * kLanes, d_gate_sum);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) out.d_gate_R[first + i] = sum(load(d_gate + i * kLanes));

    for (int64_t d = 0; d < D; d += kColumns) {
      pack_transposed(gate_DF, F, F, D, d, panel);
      pack_transposed(up_DF, F, F, D, d, panel + padded_F * kColumns);
      for (int64_t k = F; k < padded_F; ++k) {  // columns of `d_pre` that are zero meet zeros
        std::fill_n(panel + k * kColumns, kColumns, 0.0f);
        std::fill_n(panel + (padded_F + k) * kColumns, kColumns, 0.0f);
      }
      for (int64_t i = 0; i < count; i += kRows) {
        multiply_panels(2 * padded_F, d_pre + i * kColumns, most, panel, d_tile);
        put_tile<false>(d_tile, count - i, D - d, out.dx_RD + (first + i) * D + d, D);
      }
    }

    const bool add = first > item.first;
    const auto put = add ? put_tile<true> : put_tile<false>;
    for (int64_t f = 0; f < F; f += kColumns) {
      for (int64_t block = 0; block < D; block += kBlock) {
        const int64_t end = std::min(D, block + kBlock), offset = block / kBlock * block_size - block;
        for (int64_t d = block; d < end; d += kRows) {
          multiply_columns(count, x + offset + d, d_pre + f * most, pre_tile);
          put(pre_tile, end - d, F - f, out.gate + d * F + f, F);
          multiply_columns(count, x + offset + d, d_up + f * most, up_tile);
          put(up_tile, end - d, F - f, out.up + d * F + f, F);
          multiply_columns(count, dy + offset + d, gated + f * most, d_tile);
          put(d_tile, end - d, F - f, d_down_DF + d * F + f, F);
        }
      }
    }
  }
  for (int64_t d0 = 0; d0 < D; d0 += 16) {
    for (int64_t f = 0; f < F; ++f) {
      for (int64_t d = d0; d < std::min(D, d0 + 16); ++d) out.down[f * D + d] = d_down_DF[d * F + f];
    }
  }
}

Weights weights_of(const Floats& gate, const Floats& up, const Floats& down) {
  return {gate.typed_data(), up.typed_data(), down.typed_data(), gate.dimensions()[1], gate.dimensions()[2]};
}

ffi::Error forward(ffi::ThreadPool pool, Floats x_TD, Floats gate_EDF, Floats up_EDF, Floats down_EFD, Ints expert_TK,
                   Floats gate_TK, ffi::Result<Floats> y_TD) {
  thread_local Scratch scratch;
  const Weights w = weights_of(gate_EDF, up_EDF, down_EFD);
  const int64_t K = expert_TK.dimensions()[1];
  const Rows rows(expert_TK.typed_data(), expert_TK.element_count(), gate_EDF.dimensions()[0]);
  const std::vector<Item> items = items_of(rows, pool.num_threads());
  float* y_RD = scratch.get(rows.pair_R.size() * w.D);
  parallel_for(pool, items.size(),
               [&](int64_t i) { forward_item(w, items[i], rows, x_TD.typed_data(), K, y_RD); });
  combine(pool, rows, y_RD, gate_TK.typed_data(), K, w.D, y_TD->typed_data());
  return ffi::Error::Success();
}

// One matrix of those in 4 bits (moe_lab/ops/quantised.py): groups of kGroup rows, of which byte j has row j in its low
// bits and row j + kGroup / 2 in its high ones, and a scale for each column.
constexpr int64_t kGroup = 16;

struct Coded {
  const uint8_t *codes, *scale;  // [E, kGroup / 2 * groups, columns], [E, groups, columns]
  int64_t groups, columns;
};

Coded coded_of(const Bytes& codes, const Bytes& scale) {
  return {codes.typed_data(), scale.typed_data(), scale.dimensions()[1], scale.dimensions()[2]};
}

// Writes `rows` rows of an expert's matrix; value_16 has the codes' values, scale_256 the scales' by their bits.
void unpack(const Coded& w, int64_t expert, int64_t rows, const float* value_16, const float* scale_256, float* to) {
  constexpr int64_t kHalf = kGroup / 2;
  const int64_t columns = w.columns;
  const uint8_t *codes = w.codes + expert * w.groups * kHalf * columns, *bits = w.scale + expert * w.groups * columns;
  thread_local Scratch scratch;
  float* scale = scratch.get(columns);
  for (int64_t group = 0; group < w.groups; ++group, bits += columns) {
    for (int64_t f = 0; f < columns; ++f) scale[f] = scale_256[bits[f]];
    for (int64_t j = 0; j < kHalf; ++j, codes += columns) {
      const int64_t low = group * kGroup + j, high = low + kHalf;
      if (low < rows) {
        for (int64_t f = 0; f < columns; ++f) to[low * columns + f] = value_16[codes[f] & 15] * scale[f];
      }
      if (high < rows) {
        for (int64_t f = 0; f < columns; ++f) to[high * columns + f] = value_16[codes[f] >> 4] * scale[f];
      }
    }
  }
}

// As `forward`, of experts in 4 bits: a thread unpacks the one that it works on, and nobody those without rows.
ffi::Error forward_coded(ffi::ThreadPool pool, Floats x_TD, Bytes gate_codes, Bytes gate_scale, Bytes up_codes,
                         Bytes up_scale, Bytes down_codes, Bytes down_scale, Floats value_16, Floats scale_256,
                         Ints expert_TK, Floats gate_TK, ffi::Result<Floats> y_TD) {
  thread_local Scratch scratch;
  const Coded gate = coded_of(gate_codes, gate_scale), up = coded_of(up_codes, up_scale);
  const Coded down = coded_of(down_codes, down_scale);
  const int64_t D = x_TD.dimensions()[1], F = gate.columns, K = expert_TK.dimensions()[1];
  const float *values = value_16.typed_data(), *scales = scale_256.typed_data();
  const Rows rows(expert_TK.typed_data(), expert_TK.element_count(), gate_codes.dimensions()[0]);
  const std::vector<Item> items = items_of(rows, pool.num_threads());
  float* y_RD = scratch.get(rows.pair_R.size() * D);
  parallel_for(pool, items.size(), [&](int64_t i) {
    thread_local Scratch unpacked;
    float *gate_DF = unpacked.get(3 * D * F), *up_DF = gate_DF + D * F, *down_FD = up_DF + D * F;
    Item item = items[i];
    unpack(gate, item.expert, D, values, scales, gate_DF);
    unpack(up, item.expert, D, values, scales, up_DF);
    unpack(down, item.expert, F, values, scales, down_FD);
    item.expert = 0;
    forward_item({gate_DF, up_DF, down_FD, D, F}, item, rows, x_TD.typed_data(), K, y_RD);
  });
  combine(pool, rows, y_RD, gate_TK.typed_data(), K, D, y_TD->typed_data());
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Floats x_TD, Floats gate_EDF, Floats up_EDF, Floats down_EFD, Ints expert_TK,
                    Floats gate_TK, Floats dy_TD, ffi::Result<Floats> dx_TD, ffi::Result<Floats> d_gate_EDF,
                    ffi::Result<Floats> d_up_EDF, ffi::Result<Floats> d_down_EFD, ffi::Result<Floats> d_gate_TK) {
  thread_local Scratch scratch, parts_scratch;
  const Weights w = weights_of(gate_EDF, up_EDF, down_EFD);
  const int64_t E = gate_EDF.dimensions()[0], K = expert_TK.dimensions()[1], size = w.D * w.F;
  const Rows rows(expert_TK.typed_data(), expert_TK.element_count(), E);
  const std::vector<Item> items = items_of(rows, pool.num_threads());
  float *dx_RD = scratch.get(rows.pair_R.size() * (w.D + 1)), *d_gate_R = dx_RD + rows.pair_R.size() * w.D;
  // The first part of an expert's rows writes into the result, others into memory of their own.
  std::vector<int64_t> parts_E(E, 0), own(items.size(), -1);
  int64_t extra = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    ++parts_E[items[i].expert];
    if (items[i].part > 0) own[i] = extra++;
  }
  float* parts = parts_scratch.get(3 * size * extra);
  parallel_for(pool, items.size(), [&](int64_t i) {
    const int64_t at = items[i].expert * size;
    float* mine = parts + 3 * size * own[i];
    Gradients out{dx_RD, d_gate_R, mine, mine + size, mine + 2 * size};
    if (own[i] < 0) {
      out.gate = d_gate_EDF->typed_data() + at;
      out.up = d_up_EDF->typed_data() + at;
      out.down = d_down_EFD->typed_data() + at;
    }
    backward_item(w, items[i], rows, x_TD.typed_data(), dy_TD.typed_data(), gate_TK.typed_data(), K, out);
  });
  parallel_for(pool, 3 * E, [&](int64_t index) {
    const int64_t expert = index / 3, which = index % 3;
    float* to = (which == 0 ? d_gate_EDF : which == 1 ? d_up_EDF : d_down_EFD)->typed_data() + expert * size;
    if (parts_E[expert] == 0) std::fill(to, to + size, 0.0f);
    if (parts_E[expert] < 2) return;
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].expert != expert || own[i] < 0) continue;
      const float* from = parts + (3 * own[i] + which) * size;
      for (int64_t j = 0; j < size; ++j) to[j] += from[j];
    }
  });
  combine(pool, rows, dx_RD, nullptr, K, w.D, dx_TD->typed_data());
  for (size_t p = 0; p < rows.row_TK.size(); ++p) {
    d_gate_TK->typed_data()[p] = rows.row_TK[p] < 0 ? 0.0f : d_gate_R[rows.row_TK[p]];
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moe_lab

MOE_LAB_KERNEL(experts_forward, forward);
MOE_LAB_KERNEL(experts_backward, backward);
MOE_LAB_KERNEL(experts_forward_coded, forward_coded);
