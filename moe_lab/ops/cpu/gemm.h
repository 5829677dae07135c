// Small dense products on one core: tiles of kRows x kColumns held in registers.
//
// The left factor is read as it lies in a scratch block whose stride is a
// compile-time constant, row by row or column by column, so neither it nor its
// transpose is ever packed. The right factor is packed into panels of kColumns
// columns. Compilers turn the vector type into whatever the processor has.

#ifndef MOE_LAB_OPS_CPU_GEMM_H_
#define MOE_LAB_OPS_CPU_GEMM_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace moe_lab {

// Lanes of a vector and rows of a tile: kRows * 2 accumulators, two vectors of the right factor and a broadcast
// must fit into the registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 14;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 12;
#endif
constexpr int kColumns = 2 * kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t LooseIntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline IntVec load(const int32_t* p) { return *reinterpret_cast<const LooseIntVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec splat(float x) { return Vec{} + x; }
inline IntVec splat(int32_t x) { return IntVec{} + x; }
inline IntVec iota() {
  IntVec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
inline Vec select(IntVec mask, Vec a, Vec b) {
  return reinterpret_cast<Vec>((mask & reinterpret_cast<IntVec>(a)) | (~mask & reinterpret_cast<IntVec>(b)));
}
// Sum of the lanes: halves onto each other, in registers. One lane after the other takes some times as long.
inline float sum(Vec v) {
#if __has_builtin(__builtin_shufflevector) && defined(__AVX512F__)
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] + v[1];
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
inline float largest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, v[i]);
  return top;
}

// e^x to about 2 ulp: 2^n times a polynomial on [-ln2 / 2, ln2 / 2] (Cephes). Zero below -87, e^88 above 88.
inline Vec exp(Vec exponent) {
  Vec x = select(exponent > 88.0f, splat(88.0f), exponent);
  x = select(x < -87.0f, splat(-87.0f), x);
  const Vec magic = splat(12582912.0f);  // adding and taking away 1.5 * 2^23 rounds to an integer
  const Vec n = (x * 1.44269504f + magic) - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return select(exponent < -87.0f, splat(0.0f), p * reinterpret_cast<Vec>(power));
}

// A block of a left factor: kBlock columns of all its rows, row after row. The padding of kStride lets a tile read past
// the last column, and keeps rows from falling into the same few sets of the cache.
constexpr int kBlock = 256, kStride = kBlock + 16;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t num_blocks(int64_t columns) { return (columns + kBlock - 1) / kBlock; }
// Floats of a left factor [rows, columns]: block after block, each with rows for whole tiles.
inline int64_t left_size(int64_t rows, int64_t columns) {
  return num_blocks(columns) * round_up(rows, kRows) * kStride;
}
// Floats of a right factor [depth, columns]: panel after panel.
inline int64_t right_size(int64_t depth, int64_t columns) { return depth * round_up(columns, kColumns); }

struct alignas(64) Tile {
  float at[kRows][kColumns];
};

// tile = left * panel, with depth columns and rows. Element (i, k) of the left factor lies at i * kRowStep + k *
// kDepthStep; after every kBlockDepth columns it goes on `block_size` floats further (0: all in one block).
template <int kRowStep, int kDepthStep, int kBlockDepth>
inline void multiply(int64_t depth, const float* left, int64_t block_size, const float* panel, Tile& tile) {
  Vec sums[kRows][2] = {};
  for (int64_t done = 0; done < depth;) {
    const int64_t part = kBlockDepth ? std::min<int64_t>(kBlockDepth, depth - done) : depth;
    for (int64_t k = 0; k < part; ++k, panel += kColumns) {
      const Vec right0 = load(panel), right1 = load(panel + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec a = splat(left[i * kRowStep + k * kDepthStep]);
        sums[i][0] += a * right0;
        sums[i][1] += a * right1;
      }
    }
    left += block_size;
    done += part;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(tile.at[i], sums[i][0]);
    store(tile.at[i] + kLanes, sums[i][1]);
  }
}

// The left factor as `put_row` lays it out.
inline void multiply_rows(int64_t depth, const float* left, int64_t block_size, const float* panel, Tile& tile) {
  multiply<kStride, 1, kBlock>(depth, left, block_size, panel, tile);
}
// The transpose of such a factor: its columns from `left` on, over `depth` of its rows.
inline void multiply_columns(int64_t depth, const float* left, const float* panel, Tile& tile) {
  multiply<1, kStride, 0>(depth, left, 0, panel, tile);
}
// A factor of one block, `depth` columns of it.
inline void multiply_block(int64_t depth, const float* left, const float* panel, Tile& tile) {
  multiply<kStride, 1, 0>(depth, left, 0, panel, tile);
}
// A right factor (panels of `rows` rows) taken as a left one.
inline void multiply_panels(int64_t depth, const float* left, int64_t rows, const float* panel, Tile& tile) {
  multiply<kColumns, 1, kColumns>(depth, left, rows * kColumns, panel, tile);
}

// Copies one row into a left factor of `rows` rows.
inline void put_row(const float* from, int64_t columns, int64_t row, int64_t rows, float* left) {
  const int64_t block_size = round_up(rows, kRows) * kStride;
  for (int64_t k = 0; k < columns; k += kBlock) {
    std::memcpy(left + k / kBlock * block_size + row * kStride, from + k, 4 * std::min<int64_t>(kBlock, columns - k));
  }
}

// Packs columns [column, column + kColumns) of a row-major matrix; what lies beyond `columns` is zero.
inline void pack(const float* from, int64_t stride, int64_t depth, int64_t columns, int64_t column, float* panel) {
  const int64_t width = std::min<int64_t>(kColumns, columns - column);
  for (int64_t k = 0; k < depth; ++k, panel += kColumns) {
    const float* row = from + k * stride + column;
    if (width == kColumns) {
      store(panel, load(row));
      store(panel + kLanes, load(row + kLanes));
    } else {
      for (int64_t j = 0; j < kColumns; ++j) panel[j] = j < width ? row[j] : 0.0f;
    }
  }
}

// As `pack`, of the transpose of a row-major matrix whose rows are the factor's columns.
inline void pack_transposed(
    const float* from, int64_t stride, int64_t depth, int64_t columns, int64_t column, float* panel) {
  const int64_t width = std::min<int64_t>(kColumns, columns - column);
  for (int64_t j = width; j < kColumns; ++j) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kColumns + j] = 0.0f;
  }
  // In small squares, so that the lines read and written stay in the first cache.
  for (int64_t k0 = 0; k0 < depth; k0 += 16) {
    const int64_t k1 = std::min<int64_t>(k0 + 16, depth);
    for (int64_t j = 0; j < width; ++j) {
      const float* row = from + (column + j) * stride;
      for (int64_t k = k0; k < k1; ++k) panel[k * kColumns + j] = row[k];
    }
  }
}

}  // namespace moe_lab

#endif  // MOE_LAB_OPS_CPU_GEMM_H_
