// Attention's products in bf16 or fp16 with fp32 sums: tiles of 16 rows of 64 bytes, their packing and their
// product.
//
// Both instructions read the same layout, whole tiles of 1 KiB one after the other:
//   left operand:   16 rows x 32 values along k; a word of 4 bytes is two values adjacent in k
//   right operand:  row i holds, for 16 columns, the i-th pair along k
//   result:         16 rows x 16 columns of fp32
// So the transposition of a left operand as 16 x 16 words is the right operand of the transposed matrix.
// Where k runs over rows or keys, pair i of 32 is (i, i + 16): then two vectors of fp32 become one vector of
// pairs of bf16 by a shift and a merge, without permuting lanes.
#pragma once

#include "attention/cpu/half/element.h"
#include "attention/cpu/tile_scheduler.h"
#include "core/simd.h"

namespace pypar::PYPAR_ISA {
namespace half {

constexpr int64_t kTile = 16;             // rows, or columns of a result
constexpr int64_t kPairs = 32;            // values along k
constexpr int64_t kTileValues = 16 * 32;  // of 16 bits: 1 KiB
constexpr int64_t kTileSums = 16 * 16;    // of fp32: 1 KiB

// ---- products

#if defined(__AMX_BF16__)

// Holds the tile registers for the calling thread: 8 of 16 rows x 64 bytes.
struct TileScope {
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  TileScope() {
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

// result[kRowTiles][kColumnTiles] (+)= left[kRowTiles][num_k] * right[num_k][kColumnTiles]. Steps are in
// elements, from one tile to the next.
template <int kRowTiles, int kColumnTiles>
PYPAR_INLINE void multiply_tiles(int64_t num_k, const Bits* left, int64_t left_row_step, int64_t left_k_step,
                                 const Bits* right, int64_t right_column_step, int64_t right_k_step,
                                 float* result, int64_t result_row_step, int64_t result_column_step,
                                 bool accumulate) {
  float* const c00 = result;
  float* const c01 = result + result_column_step;
  float* const c10 = result + result_row_step;
  float* const c11 = c10 + result_column_step;
  if (accumulate) {
    _tile_loadd(0, c00, 64);
    if (kColumnTiles > 1) _tile_loadd(1, c01, 64);
    if (kRowTiles > 1) _tile_loadd(2, c10, 64);
    if (kRowTiles > 1 && kColumnTiles > 1) _tile_loadd(3, c11, 64);
  } else {
    _tile_zero(0);
    if (kColumnTiles > 1) _tile_zero(1);
    if (kRowTiles > 1) _tile_zero(2);
    if (kRowTiles > 1 && kColumnTiles > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < num_k; ++k) {
    _tile_loadd(4, left, 64);
    _tile_stream_loadd(6, right, 64);
    PYPAR_MULTIPLY_TILE(0, 4, 6);
    if (kColumnTiles > 1) {
      _tile_stream_loadd(7, right + right_column_step, 64);
      PYPAR_MULTIPLY_TILE(1, 4, 7);
    }
    if (kRowTiles > 1) {
      _tile_loadd(5, left + left_row_step, 64);
      PYPAR_MULTIPLY_TILE(2, 5, 6);
      if (kColumnTiles > 1) PYPAR_MULTIPLY_TILE(3, 5, 7);
    }
    left += left_k_step;
    right += right_k_step;
  }
  _tile_stored(0, c00, 64);
  if (kColumnTiles > 1) _tile_stored(1, c01, 64);
  if (kRowTiles > 1) _tile_stored(2, c10, 64);
  if (kRowTiles > 1 && kColumnTiles > 1) _tile_stored(3, c11, 64);
}

// Registers 4 to 7: 2 x 2 tiles of a left operand for multiply_held_tiles.
PYPAR_INLINE void hold_tiles(const Bits* left) {
  _tile_loadd(4, left, 64);
  _tile_loadd(5, left + kTileValues, 64);
  _tile_loadd(6, left + 2 * kTileValues, 64);
  _tile_loadd(7, left + 3 * kTileValues, 64);
}

// result[2][columns] = the held tiles * right[columns][2]: half as many loads as multiply_tiles<2, 2>.
PYPAR_INLINE void multiply_held_tiles(int64_t columns, const Bits* right, float* result,
                                      int64_t result_row_step) {
  for (int64_t j = 0; j < columns; ++j) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_stream_loadd(2, right, 64);
    PYPAR_MULTIPLY_TILE(0, 4, 2);
    PYPAR_MULTIPLY_TILE(1, 6, 2);
    _tile_stream_loadd(3, right + kTileValues, 64);
    PYPAR_MULTIPLY_TILE(0, 5, 3);
    PYPAR_MULTIPLY_TILE(1, 7, 3);
    _tile_stored(0, result, 64);
    _tile_stored(1, result + result_row_step, 64);
    right += 2 * kTileValues;
    result += kTileSums;
  }
}

#else

struct TileScope {
  TileScope() {}
  ~TileScope() {}
};

// kRows rows of a tile of the left operand; 8 x 2 sums hide the instruction's latency and take 10 loads for
// 16 products.
template <int kColumnTiles, bool kAccumulate>
static __attribute__((noinline)) void multiply_rows(int64_t num_k, const Bits* left, int64_t left_k_step,
                                                    const Bits* right, int64_t right_column_step,
                                                    int64_t right_k_step, float* result,
                                                    int64_t result_column_step) {
  constexpr int kRows = 8;
  __m512 sum[kRows][kColumnTiles];
#  pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#  pragma GCC unroll 2
    for (int j = 0; j < kColumnTiles; ++j) {
      sum[i][j] =
          kAccumulate ? _mm512_load_ps(result + j * result_column_step + i * 16) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < num_k; ++k) {
    for (int64_t pair = 0; pair < 16; ++pair) {
      __m512bh b[kColumnTiles];
#  pragma GCC unroll 2
      for (int j = 0; j < kColumnTiles; ++j) {
        b[j] = (__m512bh)_mm512_load_si512(right + j * right_column_step + pair * 32);
      }
#  pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        int32_t word;
        std::memcpy(&word, left + i * 32 + pair * 2, 4);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(word);
#  pragma GCC unroll 2
        for (int j = 0; j < kColumnTiles; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], a, b[j]);
      }
    }
    left += left_k_step;
    right += right_k_step;
  }
#  pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#  pragma GCC unroll 2
    for (int j = 0; j < kColumnTiles; ++j) {
      _mm512_store_ps(result + j * result_column_step + i * 16, sum[i][j]);
    }
  }
}

template <int kRowTiles, int kColumnTiles>
PYPAR_INLINE void multiply_tiles(int64_t num_k, const Bits* left, int64_t left_row_step, int64_t left_k_step,
                                 const Bits* right, int64_t right_column_step, int64_t right_k_step,
                                 float* result, int64_t result_row_step, int64_t result_column_step,
                                 bool accumulate) {
  for (int half = 0; half < 2 * kRowTiles; ++half) {
    const Bits* a = left + (half / 2) * left_row_step + (half % 2) * 8 * 32;
    float* c = result + (half / 2) * result_row_step + (half % 2) * 8 * 16;
    if (accumulate) {
      multiply_rows<kColumnTiles, true>(num_k, a, left_k_step, right, right_column_step, right_k_step, c,
                                        result_column_step);
    } else {
      multiply_rows<kColumnTiles, false>(num_k, a, left_k_step, right, right_column_step, right_k_step, c,
                                         result_column_step);
    }
  }
}

#endif

// ---- packing

// 16 x 16 words of one tile, transposed.
static void transpose_tile(const Bits* from, Bits* to) {
  __m512i x[16], y[16];
  const __m512i lower = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(from + i * 32);
  // Each round interleaves row i with row i + 8; after four rounds rows have become columns.
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm512_permutex2var_epi32(x[i], lower, x[i + 8]);
      y[2 * i + 1] = _mm512_permutex2var_epi32(x[i], upper, x[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, x[i]);
}

// The position of a row of one key/value head; most have one head, and a division takes as long as ten
// products.
PYPAR_INLINE int64_t position_of(int64_t row, int64_t group) { return group == 1 ? row : row / group; }

PYPAR_INLINE int64_t lse_index(const AttentionProblem& p, const Sequence& s, int64_t head, int64_t row) {
  const int64_t group = p.N / p.G, t = position_of(row, group), n = head * group + row - t * group;
  return p.cu_seqlens_q ? n * p.T + s.q_begin + t : (s.batch * p.N + n) * p.T + t;
}

// Row r of one key/value head is position r / group of the sequence and, within the group, head r % group.
struct RowSource {
  const char* data;
  int64_t position_stride, head_stride, element_stride;
  int64_t group;
  int dtype;

  // In elements.
  int64_t offset(int64_t r) const {
    const int64_t position = group == 1 ? r : r / group;
    return position * position_stride + (r - position * group) * head_stride;
  }
};

PYPAR_INLINE RowSource rows_from(const AttentionTensor& x, int64_t batch, int64_t position, int64_t head,
                                 int64_t group) {
  const int64_t first = batch * x.batch_stride + position * x.position_stride + head * group * x.head_stride;
  return RowSource{static_cast<const char*>(x.data) + first * (x.dtype == kFloat32 ? 4 : 2),
                   x.position_stride,
                   x.head_stride,
                   x.element_stride,
                   group,
                   x.dtype};
}

// 32 values of the row at `offset` from `column` on, zero from `size` on.
PYPAR_INLINE __m512i load_pairs(const RowSource& source, int64_t offset, int64_t column, int64_t size) {
  const int64_t count = size - column;
  const __mmask32 mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  const int64_t step = source.element_stride;
  if (source.dtype == kHalf) {
    const auto* from = reinterpret_cast<const Bits*>(source.data) + offset + column * step;
    if (step == 1) return _mm512_maskz_loadu_epi16(mask, from);
    alignas(64) Bits values[32] = {};
    for (int64_t i = 0; i < smaller(count, 32); ++i) values[i] = from[i * step];
    return _mm512_load_si512(values);
  }
  const auto* from = reinterpret_cast<const float*>(source.data) + offset + column * step;
  alignas(64) float values[32] = {};
  for (int64_t i = 0; i < smaller(count, 32); ++i) values[i] = from[i * step];
  return narrow_two(_mm512_load_ps(values), _mm512_load_ps(values + 16));
}

// Where rows first .. first + 15 begin; -1 for those from `count` on.
PYPAR_INLINE void find_rows(const RowSource& source, int64_t first, int64_t count, int64_t* offsets) {
  for (int64_t i = 0; i < 16; ++i) offsets[i] = i < count ? source.offset(first + i) : -1;
}
PYPAR_INLINE __m512i load_row(const RowSource& source, int64_t offset, int64_t column, int64_t size) {
  return offset < 0 ? _mm512_setzero_si512() : load_pairs(source, offset, column, size);
}

// One tile of a left operand, columns from `column` on.
static void pack_tile(const RowSource& source, const int64_t* offsets, int64_t column, int64_t size,
                      Bits* to) {
  for (int64_t i = 0; i < 16; ++i)
    _mm512_store_si512(to + i * 32, load_row(source, offsets[i], column, size));
}

// to[row tile][k tile]: a left operand with k along the columns.
static void pack_left(const RowSource& source, int64_t first, int64_t count, int64_t row_tiles, int64_t size,
                      Bits* to) {
  int64_t offsets[16];
  for (int64_t tile = 0; tile < row_tiles; ++tile) {
    find_rows(source, first + tile * 16, count - tile * 16, offsets);
    for (int64_t column = 0; column < size; column += 32, to += kTileValues) {
      pack_tile(source, offsets, column, size, to);
    }
  }
}

// to[row tile][k tile]: a right operand whose columns are the source's rows, k along the source's columns.
static void pack_right_transposed(const RowSource& source, int64_t first, int64_t count, int64_t row_tiles,
                                  int64_t size, Bits* to) {
  alignas(64) Bits tile_values[kTileValues];
  int64_t offsets[16];
  for (int64_t tile = 0; tile < row_tiles; ++tile) {
    find_rows(source, first + tile * 16, count - tile * 16, offsets);
    for (int64_t column = 0; column < size; column += 32, to += kTileValues) {
      pack_tile(source, offsets, column, size, tile_values);
      transpose_tile(tile_values, to);
    }
  }
}

// x with 0 for what is not finite, of which `some` receives the lanes.
PYPAR_INLINE __m512i finite_of(__m512i x, __mmask32* some) {
  const __m512i infinity = _mm512_set1_epi16(kInfinityBits);
  const __mmask32 bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, infinity), infinity);
  *some |= bad;
  return _mm512_maskz_mov_epi16(~bad, x);
}

// to[32 rows][column tile]: a right operand with k along the source's rows, in pairs (i, i + 16) or of
// neighbours, what is not finite as 0. The number of column tiles is even. Whether something was not finite.
template <bool kNeighbours>
static bool pack_right(const RowSource& source, int64_t first, int64_t count, int64_t row_blocks,
                       int64_t size, Bits* to) {
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  int64_t offsets[32];
  __mmask32 some = 0;
  for (int64_t block = 0; block < row_blocks; ++block, first += 32, count -= 32) {
    find_rows(source, first, count, offsets);
    find_rows(source, first + 16, count - 16, offsets + 16);
    for (int64_t column = 0; column < size; column += 32, to += 2 * kTileValues) {
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t of_a = offsets[kNeighbours ? 2 * i : i],
                      of_b = offsets[kNeighbours ? 2 * i + 1 : i + 16];
        const __m512i a = finite_of(load_row(source, of_a, column, size), &some);
        const __m512i b = finite_of(load_row(source, of_b, column, size), &some);
        for (int half = 0; half < 2; ++half) {
          const __m256i ah = half ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a);
          const __m256i bh = half ? _mm512_extracti64x4_epi64(b, 1) : _mm512_castsi512_si256(b);
          const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bh), 16);
          _mm512_store_si512(to + half * kTileValues + i * 32,
                             _mm512_ternarylogic_epi32(high, upper, _mm512_cvtepu16_epi32(ah), 0xca));
        }
      }
    }
  }
  return some != 0;
}

// 16 values of the row at `offset` from `column` on as fp32, zero from `size` on.
PYPAR_INLINE __m512 load_values(const RowSource& source, int64_t offset, int64_t column, int64_t size) {
  const int64_t count = smaller(16, size - column), step = source.element_stride;
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if (source.dtype == kFloat32) {
    const float* from = reinterpret_cast<const float*>(source.data) + offset + column * step;
    if (step == 1) return _mm512_maskz_loadu_ps(mask, from);
    alignas(64) float values[16] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = from[i * step];
    return _mm512_load_ps(values);
  }
  const Bits* from = reinterpret_cast<const Bits*>(source.data) + offset + column * step;
  if (step == 1) return widen(_mm256_maskz_loadu_epi16(mask, from));
  alignas(32) Bits bits[16] = {};
  for (int64_t i = 0; i < count; ++i) bits[i] = from[i * step];
  return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(bits)));
}

// The same the other way, rounded once.
PYPAR_INLINE void store_values(const RowSource& target, int64_t offset, int64_t column, int64_t size,
                               __m512 x) {
  const int64_t count = smaller(16, size - column), step = target.element_stride;
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  char* const data = const_cast<char*>(target.data);
  if (target.dtype == kFloat32) {
    auto* to = reinterpret_cast<float*>(data) + offset + column * step;
    if (step == 1) return _mm512_mask_storeu_ps(to, mask, x);
    alignas(64) float values[16];
    _mm512_store_ps(values, x);
    for (int64_t i = 0; i < count; ++i) to[i * step] = values[i];
    return;
  }
  auto* to = reinterpret_cast<Bits*>(data) + offset + column * step;
  const __m256i rounded = narrow(x);
  if (step == 1) return _mm256_mask_storeu_epi16(to, mask, rounded);
  alignas(32) Bits values[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(values), rounded);
  for (int64_t i = 0; i < count; ++i) to[i * step] = values[i];
}

// The same of 32 values.
PYPAR_INLINE void store_two(const RowSource& target, int64_t offset, int64_t column, int64_t size, __m512 a,
                            __m512 b) {
  if (target.dtype == kHalf && target.element_stride == 1) {
    const __mmask32 mask = _bzhi_u32(~uint32_t{0}, static_cast<uint32_t>(smaller(32, size - column)));
    auto* to = reinterpret_cast<Bits*>(const_cast<char*>(target.data)) + offset + column;
    return _mm512_mask_storeu_epi16(to, mask, narrow_two(a, b));
  }
  store_values(target, offset, column, size, a);
  if (column + 16 < size) store_values(target, offset, column + 16, size, b);
}

}  // namespace half
}  // namespace pypar::PYPAR_ISA
