// Products of groups of rows, each with a matrix of its own: contract and definition in
// pypar/ops/grouped_matmul.
//
// A group may have a single row, so that its matrix is used as it lies, without packing: each element is read
// from memory once, and converted where it is used. Rows are packed, 16 at a time. A task is a group and a
// block of what it makes, so that a result does not depend on the number of threads. Sums in chunks lose far
// less than one long sum would.
#include "core/registry.h"

namespace pypar {

struct GroupedMatmul {
  const void* x;          // [.., depth], rows x_stride apart
  const void* y;          // matrices y_group_stride apart, or rows
  void* out;              // rows, or matrices out_group_stride apart
  const int64_t* groups;  // [num_groups, 3]: the number of the matrix, the first row, how many rows
  int64_t num_groups, depth, size, x_stride, y_stride, y_group_stride, out_stride, out_group_stride;
  int element_type, num_threads;
};

PYPAR_KERNEL(grouped_matmul_dots, GroupedMatmul)
PYPAR_KERNEL(grouped_matmul_sums, GroupedMatmul)
PYPAR_KERNEL(grouped_matmul_outer, GroupedMatmul)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/lanes.h"
#  include "core/streaming_stores.h"

namespace pypar::PYPAR_ISA {

constexpr int kTile = 4;           // rows of a register tile
constexpr int64_t kRowBlock = 16;  // rows that are packed at a time
constexpr int64_t kPad = 16;  // floats between packed rows: rows a power of two apart share few cache lines
constexpr int64_t kDotChunk =
    kWidth == 16 ? 512 : 256;  // of depth, so that the packed rows fill half of the cache
constexpr int64_t kDotAhead =
    4;  // tiles of a matrix between the one that is used and the one that is fetched
constexpr int64_t kDotBlock = 64;   // rows of a matrix that one task multiplies with
constexpr int64_t kSumTerms = 16;   // rows of a matrix that are added before they are added to a sum
constexpr int64_t kSumBlock = 256;  // columns of a task
constexpr int64_t kSumStride = kSumBlock + kPad;
constexpr int64_t kOuterLines = 64;   // lines of a matrix that one task makes
constexpr int64_t kOuterRows = 64;    // rows of a chunk
constexpr int64_t kOuterBlock = 512;  // columns of a chunk
constexpr int64_t kOuterStride = kOuterBlock + kPad;

struct Group {
  int64_t number, first, count;
};

PYPAR_INLINE Group group_of(const GroupedMatmul& a, int64_t i) {
  return {a.groups[3 * i], a.groups[3 * i + 1], a.groups[3 * i + 2]};
}

// to[rows][to_stride] = from[rows][size] in fp32. What is beyond, up to whole tiles and vectors, is zero.
template <class Element>
static void pack(const Element* from, int64_t from_stride, int64_t rows, int64_t size, float* to,
                 int64_t to_stride) {
  for (int64_t row = 0; row < round_up(rows, kTile); ++row, to += to_stride) {
    const Element* x = from + row * from_stride;
    for_vectors(size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      store(to + i, row < rows ? load_first(x + i, count) : zero());
    });
  }
}

// task(group, block) for all blocks of all groups, in parallel.
template <class Task>
static void for_tasks(const GroupedMatmul& a, int64_t blocks, const Task& task) {
  parallel_for(a.num_groups * blocks, 1, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(group_of(a, i / blocks), i % blocks);
  });
}

// ---- dots: out[r][n] = sum over k of x[r][k] y[n][k]

// In place of vectors [kWidth], the first is the vector of their sums.
PYPAR_INLINE void sum_lanes(Float* x) {
#  pragma GCC unroll 4
  for (int count = kWidth; count > 1; count /= 2) {
#  pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) x[i] = add_interleaved(x[i], x[i + count / 2]);
  }
}

// As many columns as give a whole vector of sums, or two of the shortest vectors.
constexpr int kColumns = kWidth == 4 ? 2 : kWidth / 4;

// sums[r][c] += the products of kTile rows of x and kUsed rows of y.
template <int kUsed, class Element>
static __attribute__((noinline)) void dots_tile(const float* x, int64_t x_stride, const Element* y,
                                                int64_t y_stride, int64_t size, float* sums,
                                                int64_t sums_stride, int64_t prefetched) {
  constexpr int kSums = (kUsed * kTile + kWidth - 1) / kWidth * kWidth;
  Float sum[kSums] = {};
  const auto add = [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    Float left[kTile];
#  pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) left[r] = load(x + r * x_stride + i);
#  pragma GCC unroll 4
    for (int c = 0; c < kUsed; ++c) {
      if (prefetched > 0) __builtin_prefetch(y + prefetched + c * y_stride + i);
      const Float right = load_first(y + c * y_stride + i, count);
#  pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) sum[r * kUsed + c] += left[r] * right;
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) add(i, kWidth);
  if (i < size) add(i, size - i);
  float found[kSums];
#  pragma GCC unroll 2
  for (int first = 0; first < kSums; first += kWidth) {
    sum_lanes(sum + first);
    store(found + first, sum[first]);
  }
  for (int r = 0; r < kTile; ++r) {
    for (int c = 0; c < kUsed; ++c) sums[r * sums_stride + c] += found[r * kUsed + c];
  }
}

template <class Element>
static void dots_task(const GroupedMatmul& a, const Group& group, int64_t block) {
  constexpr int64_t kStride = kDotChunk + kPad;
  auto* const packed =
      static_cast<float*>(thread_scratch((kRowBlock * (kStride + kDotBlock)) * sizeof(float)));
  float* const sums = packed + kRowBlock * kStride;
  const int64_t column = block * kDotBlock, columns = smaller(kDotBlock, a.size - column);
  const auto* const x = static_cast<const Element*>(a.x) + group.first * a.x_stride;
  const auto* const y =
      static_cast<const Element*>(a.y) + group.number * a.y_group_stride + column * a.y_stride;
  auto* const out = static_cast<Element*>(a.out) + group.first * a.out_stride + column;
  const int64_t ahead = kDotAhead * kColumns * a.y_stride;
  for (int64_t row = 0; row < group.count; row += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, group.count - row);
    for (int64_t i = 0; i < kRowBlock * kDotBlock; i += kWidth) store(sums + i, zero());
    for (int64_t k = 0; k < a.depth; k += kDotChunk) {
      const int64_t depth = smaller(kDotChunk, a.depth - k);
      pack(x + row * a.x_stride + k, a.x_stride, rows, depth, packed, kStride);
      int64_t n = 0;
      for (; n + kColumns <= columns; n += kColumns) {
        for (int64_t r = 0; r < rows; r += kTile) {
          dots_tile<kColumns>(packed + r * kStride, kStride, y + n * a.y_stride + k, a.y_stride, depth,
                              sums + r * kDotBlock + n, kDotBlock, r == 0 && row == 0 ? ahead : 0);
        }
      }
      for (; n < columns; ++n) {
        for (int64_t r = 0; r < rows; r += kTile) {
          dots_tile<1>(packed + r * kStride, kStride, y + n * a.y_stride + k, a.y_stride, depth,
                       sums + r * kDotBlock + n, kDotBlock, 0);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for_vectors(columns, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
        store_first(out + (row + r) * a.out_stride + i, load(sums + r * kDotBlock + i), count);
      });
    }
  }
}

// ---- products of rows: result[kTile][kUsed vectors] (+)= sum over i < terms of a[.][i] * b[i][.]

// a's element (row r, term i) is at r * a_row + i * a_term. count: the elements of b that the last vector
// has.
template <int kUsed, class Element>
static __attribute__((noinline)) void rows_tile(int64_t terms, const float* a, int64_t a_row, int64_t a_term,
                                                const Element* b, int64_t b_stride, int64_t count,
                                                float* result, int64_t result_stride, bool adds,
                                                int64_t prefetched) {
  Float sum[kTile][kUsed] = {};
  for (int64_t i = 0; i < terms; ++i) {
    if (prefetched > 0) {
      for (int64_t line = 0; line < kUsed * kWidth; line += 64 / static_cast<int64_t>(sizeof(Element))) {
        __builtin_prefetch(b + prefetched + line);
      }
    }
    Float right[kUsed];
#  pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) {
      right[v] = v + 1 < kUsed ? load(b + v * kWidth) : load_first(b + v * kWidth, count);
    }
#  pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      const Float left = broadcast(a[r * a_row]);
#  pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) sum[r][v] += left * right[v];
    }
    a += a_term;
    b += b_stride;
  }
#  pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#  pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) {
      float* to = result + r * result_stride + v * kWidth;
      store(to, adds ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

constexpr int kVectors = kNumRegisters == 32 ? 4 : 2;

// tile(i, vectors, count): vectors that together are [0, size), kVectors of them or one; `count` elements in
// the last.
template <class Tile>
PYPAR_INLINE void for_column_tiles(int64_t size, const Tile& tile) {
  int64_t i = 0;
  for (; i + kVectors * kWidth <= size; i += kVectors * kWidth) tile(i, true, kWidth);
  for (; i < size; i += kWidth) tile(i, false, smaller(kWidth, size - i));
}

// ---- sums: out[r][n] = sum over k of x[r][k] y[k][n]

template <class Element>
static void sums_task(const GroupedMatmul& a, const Group& group, int64_t block) {
  auto* const packed = static_cast<float*>(
      thread_scratch(kRowBlock * (kSumTerms + kSumStride + 2 * kVectors * kWidth) * sizeof(float)));
  float* const sums = packed + kRowBlock * kSumTerms;
  float* const matrix = sums + kRowBlock * kSumStride;  // [kSumTerms, kTileStride]
  constexpr int64_t kTileStride = kVectors * kWidth;
  const int64_t column = block * kSumBlock, columns = smaller(kSumBlock, a.size - column);
  const auto* const x = static_cast<const Element*>(a.x) + group.first * a.x_stride;
  const auto* const y = static_cast<const Element*>(a.y) + group.number * a.y_group_stride + column;
  auto* const out = static_cast<Element*>(a.out) + group.first * a.out_stride + column;
  for (int64_t row = 0; row < group.count; row += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, group.count - row);
    for (int64_t i = 0; i < kRowBlock * kSumStride; i += kWidth) store(sums + i, zero());
    for (int64_t k = 0; k < a.depth; k += kSumTerms) {
      const int64_t terms = smaller(kSumTerms, a.depth - k);
      // The next rows of the matrix arrive while these are multiplied: many streams at once are more than a
      // core looks ahead on its own.
      const int64_t ahead = row == 0 && k + 2 * kSumTerms <= a.depth ? kSumTerms * a.y_stride : 0;
      pack(x + row * a.x_stride + k, a.x_stride, rows, terms, packed, kSumTerms);
      for_column_tiles(columns, [&](int64_t i, bool is_wide, int64_t count) PYPAR_INLINE_LAMBDA {
        const Element* tile = y + k * a.y_stride + i;
        if (rows <= kTile) {
          (is_wide ? rows_tile<kVectors, Element> : rows_tile<1, Element>)(terms, packed, kSumTerms, 1, tile,
                                                                           a.y_stride, count, sums + i,
                                                                           kSumStride, true, ahead);
          return;
        }
        // Several tiles of rows use it: rows of a matrix are often a power of two apart and would throw each
        // other out of the cache.
        pack(tile, a.y_stride, terms, is_wide ? kTileStride : count, matrix, kTileStride);
        for (int64_t term = 0; ahead > 0 && term < terms; ++term) {
          __builtin_prefetch(tile + ahead + term * a.y_stride);
        }
        for (int64_t r = 0; r < rows; r += kTile) {
          (is_wide ? rows_tile<kVectors, float>
                   : rows_tile<1, float>)(terms, packed + r * kSumTerms, kSumTerms, 1, matrix, kTileStride,
                                          kWidth, sums + r * kSumStride + i, kSumStride, true, 0);
        }
      });
    }
    for (int64_t r = 0; r < rows; ++r) {
      for_vectors(columns, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
        store_first(out + (row + r) * a.out_stride + i, load(sums + r * kSumStride + i), count);
      });
    }
  }
}

// ---- outer: out[k][n] = sum over the group's rows r of x[r][k] y[r][n]

template <class Element>
static void outer_task(const GroupedMatmul& a, const Group& group, int64_t block) {
  auto* const ys = static_cast<float*>(thread_scratch(
      (kOuterRows * (kOuterStride + kOuterLines) + kOuterLines * kOuterStride) * sizeof(float)));
  float* const xs = ys + kOuterRows * kOuterStride;
  float* const sums = xs + kOuterRows * kOuterLines;
  const int64_t line = block * kOuterLines, lines = smaller(kOuterLines, a.depth - line);
  const auto* const x = static_cast<const Element*>(a.x) + group.first * a.x_stride + line;
  const auto* const y = static_cast<const Element*>(a.y) + group.first * a.y_stride;
  auto* const out = static_cast<Element*>(a.out) + group.number * a.out_group_stride + line * a.out_stride;
  const bool streams = a.out_stride == a.size &&
                       is_streamed(static_cast<const Element*>(a.out), a.num_groups * a.depth, a.size);
  for (int64_t column = 0; column < a.size; column += kOuterBlock) {
    const int64_t columns = smaller(kOuterBlock, a.size - column);
    int64_t row = 0;
    do {
      const int64_t rows = smaller(kOuterRows, group.count - row);
      const bool is_last = row + rows >= group.count;
      pack(x + row * a.x_stride, a.x_stride, rows, lines, xs, kOuterLines);
      pack(y + row * a.y_stride + column, a.y_stride, rows, columns, ys, kOuterStride);
      for (int64_t l = 0; l < lines; l += kTile) {
        for_column_tiles(columns, [&](int64_t i, bool is_wide, int64_t) PYPAR_INLINE_LAMBDA {
          (is_wide ? rows_tile<kVectors, float>
                   : rows_tile<1, float>)(rows, xs + l, 1, kOuterLines, ys + i, kOuterStride, kWidth,
                                          sums + l * kOuterStride + i, kOuterStride, row > 0, 0);
        });
        for (int64_t done = l; is_last && done < smaller(l + kTile, lines); ++done) {
          const float* from = sums + done * kOuterStride;
          Element* to = out + done * a.out_stride + column;
          for_vectors(columns, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
            streams ? put_first<true>(to + i, load(from + i), count)
                    : put_first<false>(to + i, load(from + i), count);
          });
        }
      }
      row += rows;
    } while (row < group.count);
  }
  finish_streams();
}

void grouped_matmul_dots(const GroupedMatmul& a) {
  by_element_type(a.element_type, [&](auto element) {
    for_tasks(a, (a.size + kDotBlock - 1) / kDotBlock,
              [&](const Group& group, int64_t block) { dots_task<decltype(element)>(a, group, block); });
  });
}

void grouped_matmul_sums(const GroupedMatmul& a) {
  by_element_type(a.element_type, [&](auto element) {
    for_tasks(a, (a.size + kSumBlock - 1) / kSumBlock,
              [&](const Group& group, int64_t block) { sums_task<decltype(element)>(a, group, block); });
  });
}

void grouped_matmul_outer(const GroupedMatmul& a) {
  by_element_type(a.element_type, [&](auto element) {
    for_tasks(a, (a.depth + kOuterLines - 1) / kOuterLines,
              [&](const Group& group, int64_t block) { outer_task<decltype(element)>(a, group, block); });
  });
}

}  // namespace pypar::PYPAR_ISA

#else

template <class Kernels>
static void bind_product(pybind11::module_& module, const char* name) {
  module.def(name, [](uintptr_t x, uintptr_t y, uintptr_t out, uintptr_t groups, int64_t num_groups,
                      int64_t depth, int64_t size, int64_t x_stride, int64_t y_stride, int64_t y_group_stride,
                      int64_t out_stride, int64_t out_group_stride, int element_type, int num_threads) {
    pypar::launch<Kernels>(pypar::GroupedMatmul{
        reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(y), reinterpret_cast<void*>(out),
        reinterpret_cast<const int64_t*>(groups), num_groups, depth, size, x_stride, y_stride, y_group_stride,
        out_stride, out_group_stride, element_type, num_threads});
  });
}

PYPAR_BIND(grouped_matmul) {
  bind_product<pypar::grouped_matmul_dots_kernels>(module, "grouped_matmul_dots");
  bind_product<pypar::grouped_matmul_sums_kernels>(module, "grouped_matmul_sums");
  bind_product<pypar::grouped_matmul_outer_kernels>(module, "grouped_matmul_outer");
}

#endif
