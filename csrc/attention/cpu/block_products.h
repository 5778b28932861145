// The parts that attention's forward and backward are made of: packed blocks of rows, and products of blocks.
//
// Blocks are kBlock rows or keys, in fp32, rows padded to whole vectors; together the blocks of one step stay
// in the second-level cache, and the operand that a product re-reads most (at H = 64: 24 KiB) in the first.
//
// Forward and backward are templates over an arithmetic (fp32.h shows one). It owns the products
// and the form of their operands, nothing else; masks, softmax and bookkeeping see fp32 scores only. One is
// made per task, on the thread that runs it. Its operands are byte arrays, aligned to 64, of its own sizes
// (multiples of 64) for one block of kBlock rows or keys; `count` <= kBlock says how many are there. `seen`
// holds, per group of kRows rows of a product's result, the range that matters (see `multiply`), or is null:
// an arithmetic may compute more. What is outside is never read in scores, and is 0 in p and ds.
//
//   Arithmetic(const AttentionProblem&)
//   forward
//     queries_bytes(), keys_bytes(), values_bytes(), out_bytes(), scratch_bytes()
//     pack_queries(rows, first, count, sign, queries, scratch); pack_keys(rows, first, count, keys, scratch)
//     pack_values(rows, first, count, values, scratch)  an operand = rows first, first + 1, ... (* sign)
//     scores(queries, count, keys, num_keys, seen, result)  float [key][kBlock]; count rounded up to
//                                           kWidth; seen: ranges of rows, in vectors
//     cleanse_values(values, num_keys)      what is not finite becomes 0; whether something was not
//     clear_out(out)
//     add_out(p, count, values, num_keys, seen, rescale, out, scratch)  out[row] = out[row] * rescale[row]
//                                 + sum of p[key][row] value[key]; rescale null: all 1; seen: ranges of keys
//     read_out(out, count, result, &stride)        the address of float [row][stride]: result, which has room
//                                                  for kBlock * padded_size(Hv), or where they are already
//   backward
//     key_operands_bytes(), row_operands_bytes(), dk_bytes(), dv_bytes(), scratch_bytes()
//     pack_key_operands(k, v, first, count, operands, scratch)
//     pack_row_operands(q, dout, first, count, sign, operands, scratch)
//     products(row operands, count, key operands, num_keys, seen, s, dp)   float [row][kBlock] both:
//                                                              q . k and dout . v; seen: ranges of keys, in
//                                                              vectors
//     decoded_scores(row operands, count, key operands, num_keys, s)   the first of these once more, summed
//                                                              as decoding sums it
//     cleanse_operands(row operands, count, key operands, num_keys)    as cleanse_values, of what the sums
//                                           below read; `products` of these rows and `decoded_scores` come
//                                           before
//     clear_sums(dk, dv)
//     set_aside(dk, dv, first)   moves the sums to totals that stand beside them (if not first: adds them)
//     add_totals(dk, dv)         adds these to the sums, which read_dk and read_dv give
//     add_dk_dv(p, ds, row operands, count, num_keys, seen, dk, dv, scratch)   dv += p^T dout, dk += ds^T q;
//                              p and ds are [row][kBlock], 0 up to whole vectors of keys; seen: per keys,
//                              ranges of rows
//     add_dq(ds, count, key operands, num_keys, seen, first, sum, scratch)     sum (if first: =) ds k; seen:
//     per rows,
//                              ranges of keys. sum: kBlock * padded_size(H) floats in a form of its own
//     read_dq(sum, count, result, &stride), read_dk(dk, ...), read_dv(dv, ...)   as read_out
#pragma once

#include "attention/cpu/tile_scheduler.h"
#include "core/lanes.h"

namespace pypar::PYPAR_ISA {

// A register tile is kRows x kVecs vectors: its sums, one row of the right operand and one broadcast value
// fill the registers. kBlock is a multiple of kRows and of kVecs * kWidth or half of it, so full blocks waste
// nothing.
constexpr int kRows = 6;
constexpr int kVecs = kNumRegisters == 32 ? 4 : 2;
constexpr int64_t kGroups = kBlock / kRows;
// So many products are summed before they are added to what was summed before: scores and dp, which are not
// averaged over anything afterwards, in shorter pieces than the sums over rows or keys.
// Without fused multiply-add every product is rounded too, which half the length makes up for.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t kChunk = 16;
#else
constexpr int64_t kChunk = 8;
#endif
constexpr int64_t kLongChunk = 32;
// A key's dk and dv are sums over the rows of all query heads that share it: after so many blocks of rows
// they are added to totals and begun anew, for what an addition loses grows with the sum.
constexpr int64_t kBlocksOfSums = 8;
constexpr float kLog2e = 1.44269504088896340736f;

static_assert(kBlock % kRows == 0 && kBlock % kWidth == 0, "blocks are made of whole tiles");

// Products are summed in chunks before they are added to what was summed before: the first has `first` of
// them, the others `size`.
struct Chunk {
  int64_t first, size;
};

// c[kRows][kUsed vectors] (+)= a[kRows][k] * b[k][kUsed vectors]. a is stored with its rows adjacent along k,
// or, if kTransposedA, with the values of one k adjacent. Sums in chunks lose far less than one long sum
// would.
template <int kUsed, bool kTransposedA, bool kAccumulate>
static __attribute__((noinline)) void multiply_tile(int64_t k, const Chunk chunk, const float* a,
                                                    int64_t a_stride, const float* b, int64_t b_stride,
                                                    float* c, int64_t c_stride) {
  bool add = kAccumulate;
  int64_t most = chunk.first;
  do {
    Float sum[kRows][kUsed];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kUsed; ++j) sum[i][j] = zero();
    }
    const int64_t steps = smaller(k, most);
    for (int64_t p = 0; p < steps; ++p) {
      Float right[kUsed];
#pragma GCC unroll 8
      for (int j = 0; j < kUsed; ++j) right[j] = load(b + j * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Float left = broadcast(kTransposedA ? a[i] : a[i * a_stride]);
#pragma GCC unroll 8
        for (int j = 0; j < kUsed; ++j) sum[i][j] += left * right[j];
      }
      a += kTransposedA ? a_stride : 1;
      b += b_stride;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kUsed; ++j) {
        float* result = c + i * c_stride + j * kWidth;
        store(result, add ? load(result) + sum[i][j] : sum[i][j]);
      }
    }
    add = true;
    most = chunk.size;
    k -= steps;
  } while (k > 0);
}

// c[num_rows][num_vecs] (+)= a * b over k in [0, k_size), num_rows rounded up to whole tiles. Where given,
// `columns` (in vectors) and `depth` (in k) hold one range per group of kRows rows: what lies outside is not
// computed, and c is left as it is there. Chunks end at multiples of `chunk_size`, a power of two, wherever
// `depth` begins:
// what a row adds up in which order does not depend on the others of its group, whose range it shares.
template <bool kTransposedA, bool kAccumulate>
static void multiply(int64_t num_rows, int64_t num_vecs, int64_t k_size, const float* a, int64_t a_stride,
                     const float* b, int64_t b_stride, float* c, int64_t c_stride, const Range* columns,
                     const Range* depth, int64_t chunk_size = kLongChunk) {
  const int64_t num_panels = (num_vecs + kVecs - 1) / kVecs;
  const int64_t panel = (num_vecs + num_panels - 1) / num_panels;  // equal ones: 3 + 3 is faster than 4 + 2
  for (int64_t first = 0; first < num_vecs; first += panel) {
    for (int64_t row = 0, group = 0; row < num_rows; row += kRows, ++group) {
      const int64_t begin = columns ? larger(first, columns[group].begin) : first;
      const int64_t end = smaller(smaller(first + panel, num_vecs), columns ? columns[group].end : num_vecs);
      const int64_t k_begin = depth ? depth[group].begin : 0;
      const int64_t k = (depth ? depth[group].end : k_size) - k_begin;
      if (kAccumulate && k <= 0) continue;
      const Chunk chunk{chunk_size - (k_begin & (chunk_size - 1)), chunk_size};
      const float* left = kTransposedA ? a + k_begin * a_stride + row : a + row * a_stride + k_begin;
      const float* right = b + k_begin * b_stride + begin * kWidth;
      float* result = c + row * c_stride + begin * kWidth;
      switch (end - begin) {
        case 1:
          multiply_tile<1, kTransposedA, kAccumulate>(k, chunk, left, a_stride, right, b_stride, result,
                                                      c_stride);
          break;
        case 2:
          multiply_tile<2, kTransposedA, kAccumulate>(k, chunk, left, a_stride, right, b_stride, result,
                                                      c_stride);
          break;
#if defined(__AVX512F__) || defined(__aarch64__)
        case 3:
          multiply_tile<3, kTransposedA, kAccumulate>(k, chunk, left, a_stride, right, b_stride, result,
                                                      c_stride);
          break;
        case 4:
          multiply_tile<4, kTransposedA, kAccumulate>(k, chunk, left, a_stride, right, b_stride, result,
                                                      c_stride);
          break;
#endif
        default:
          break;
      }
    }
  }
}

// ---- rows in the caller's memory

// Rows of one batch element and key/value head. Row r is position r / group and, within the group, head r %
// group.
struct Rows {
  char* data;
  int64_t position_stride, head_stride, element_stride;
  int64_t group;
  int dtype;

  template <class Element>
  Element* row(int64_t r) const {
    return reinterpret_cast<Element*>(data) + r / group * position_stride + r % group * head_stride;
  }
};

PYPAR_INLINE int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// `begin`: the sequence's first position.
PYPAR_INLINE Rows rows_of(const AttentionTensor& x, int64_t batch, int64_t begin, int64_t head,
                          int64_t group) {
  const int64_t offset = batch * x.batch_stride + begin * x.position_stride + head * group * x.head_stride;
  char* data = static_cast<char*>(x.data) + offset * element_size(x.dtype);
  return Rows{data, x.position_stride, x.head_stride, x.element_stride, group, x.dtype};
}

template <class Element>
static void pack_as(const Rows& source, int64_t first, int64_t count, int64_t size, float factor,
                    float* packed, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const Element* from = source.row<Element>(first + r);
    float* to = packed + r * stride;
    if (source.element_stride != 1) {
      for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i * source.element_stride]) * factor;
      for (int64_t i = size; i < stride; ++i) to[i] = 0.0f;
      continue;
    }
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(to + i, load(from + i) * factor);
    if (i < size) store(to + i, load_partial(from + i, size - i) * factor);
  }
}

// packed[count][stride] = rows first, first + 1, ... times factor; stride is `size` rounded up to whole
// vectors, and what is beyond `size`, or beyond `count` up to a whole tile or vector of rows, is zero.
static void pack(const Rows& source, int64_t first, int64_t count, int64_t size, float factor, float* packed,
                 int64_t stride) {
  switch (source.dtype) {
    case kFloat32:
      pack_as<float>(source, first, count, size, factor, packed, stride);
      break;
    case kBFloat16:
      pack_as<BFloat16>(source, first, count, size, factor, packed, stride);
      break;
    default:
      pack_as<Float16>(source, first, count, size, factor, packed, stride);
      break;
  }
  const int64_t padded = smaller(kBlock, round_up(count, kWidth) + kRows);
  for (float* p = packed + count * stride; p < packed + padded * stride; p += kWidth) store(p, zero());
}

// packed[size] = one row.
static inline void pack_row(const Rows& source, int64_t row, int64_t size, float* packed) {
  switch (source.dtype) {
    case kFloat32:
      pack_as<float>(source, row, 1, size, 1.0f, packed, size);
      break;
    case kBFloat16:
      pack_as<BFloat16>(source, row, 1, size, 1.0f, packed, size);
      break;
    default:
      pack_as<Float16>(source, row, 1, size, 1.0f, packed, size);
      break;
  }
}

template <class Element>
static void unpack_as(const float* packed, int64_t stride, int64_t count, int64_t size, float factor,
                      const Rows& target, int64_t first) {
  for (int64_t r = 0; r < count; ++r) {
    const float* from = packed + r * stride;
    Element* to = target.row<Element>(first + r);
    if (target.element_stride != 1) {
      for (int64_t i = 0; i < size; ++i) from_float(from[i] * factor, to + i * target.element_stride);
      continue;
    }
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(to + i, load(from + i) * factor);
    if (i < size) store_partial(to + i, load(from + i) * factor, size - i);
  }
}

// The reverse: rows first, first + 1, ... of the target = packed * factor, rounded once.
static void unpack(const float* packed, int64_t stride, int64_t count, int64_t size, float factor,
                   const Rows& target, int64_t first) {
  switch (target.dtype) {
    case kFloat32:
      unpack_as<float>(packed, stride, count, size, factor, target, first);
      break;
    case kBFloat16:
      unpack_as<BFloat16>(packed, stride, count, size, factor, target, first);
      break;
    default:
      unpack_as<Float16>(packed, stride, count, size, factor, target, first);
      break;
  }
}

// Rows of the target, in fp32, += packed * factor.
static inline void unpack_add(const float* packed, int64_t stride, int64_t count, int64_t size, float factor,
                              const Rows& target, int64_t first) {
  for (int64_t r = 0; r < count; ++r) {
    const float* from = packed + r * stride;
    float* to = target.row<float>(first + r);
    for (int64_t i = 0; i < size; ++i) to[i * target.element_stride] += from[i] * factor;
  }
}

// What is not finite in x[count] becomes 0; count is a multiple of kWidth. Whether something was not.
static __attribute__((noinline)) bool cleanse(float* x, int64_t count) {
  constexpr int64_t kSums = 4, kStep = kSums * kWidth;
  Float sum[kSums] = {};  // of x * 0: 0 for every number
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kSums; ++j) sum[j] += load(x + i + j * kWidth) * 0.0f;
  }
  for (; i < count; i += kWidth) sum[0] += load(x + i) * 0.0f;
  if (!any((Int)((sum[0] + sum[1]) + (sum[2] + sum[3]) != 0.0f))) return false;
  for (i = 0; i < count; i += kWidth) {
    const Float value = load(x + i);
    store(x + i, select((Int)(value * 0.0f == 0.0f), value, zero()));
  }
  return true;
}

// ---- transposition

// to[j][i] = from[i][j] for i < num_rows, j < num_columns, both rounded up to whole vectors.
static void transpose(const float* from, int64_t from_stride, int64_t num_rows, int64_t num_columns,
                      float* to, int64_t to_stride) {
  for (int64_t i = 0; i < num_rows; i += kWidth) {
    for (int64_t j = 0; j < num_columns; j += kWidth) {
      Float x[kWidth], y[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) x[r] = load(from + (i + r) * from_stride + j);
      // Each round interleaves row r with row r + kWidth / 2; after log2(kWidth) rounds rows have become
      // columns.
#pragma GCC unroll 4
      for (int round = 1; round < kWidth; round *= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < kWidth / 2; ++r) {
          y[2 * r] = interleave<false>(x[r], x[r + kWidth / 2]);
          y[2 * r + 1] = interleave<true>(x[r], x[r + kWidth / 2]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) x[r] = y[r];
      }
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) store(to + (j + r) * to_stride + i, x[r]);
    }
  }
}

}  // namespace pypar::PYPAR_ISA
