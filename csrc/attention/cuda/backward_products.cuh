// What attention's backward kernels are made of: tile sizes and the two kinds of product.
//
// A block owns rows and streams columns past them, in either pass:
//             rows: own[0], own[1]    columns: streamed[0], [1]   sums
//   keys      k, v                    q, dout                     dk = dS^T q, dv = P^T dout
//   queries   q, dout                 k, v                        dq = dS k
// A step multiplies own[0] streamed[0]^T (scores) and own[1] streamed[1]^T (dP), makes P and dS of them in
// the registers that hold the products, and multiplies these by streamed[1] and streamed[0]. So P and dS
// never leave their thread: an accumulator of the tensor cores is laid out as their next left operand.
#pragma once

#include "attention/cuda/thread_block.cuh"

namespace pypar::cuda {

struct Float32Tag {};

template <class Tag>
struct BackwardElement {
  using Type = uint16_t;
};
template <>
struct BackwardElement<Float32Tag> {
  using Type = float;
};

// Tile sizes by type and padded head size. All fit in 99 KiB, the least that a supported GPU gives a block
// (sm_86, sm_89, sm_120), and in 255 registers a thread without spills.
//   warps x 16 row tiles   The rows that a block owns. One row tile a warp reads a matrix from shared memory
//   for two
//                          mma: as long as they take on sm_80. A second row tile uses it twice, but needs
//                          sums of its own in registers; only head size 64 has room for them.
//   columns                In shared memory are two tiles of that many: one in use, one on its way.
//   step                   Columns of a product: scores and dP take 8 registers per 16 of them and row tile,
//   each. split                  At head size 256 dk and dv of 16 rows would take all 255 registers. One
//   block then makes
//                          dk, another dv; both make scores: 5 products instead of 4.
// A block of 128 rows reads 256 bytes per column and 64 of head size, from L2, for 4 x 128 x 64
// multiply-adds: 1/5 of what L2 can give while the tensor cores of sm_80 are busy.
template <class Tag, int kSize>
struct BackwardSizes;

template <int kWarpsValue, int kRowTilesValue, int kColumnsValue, int kStepValue, bool kSplitValue>
struct BackwardSizesOf {
  static constexpr int kWarps = kWarpsValue, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kRowTilesValue, kRows = 16 * kRowTiles * kWarps;
  static constexpr int kColumns = kColumnsValue, kStep = kStepValue;
  static constexpr bool kSplit = kSplitValue;
};

template <class Tag>
struct BackwardSizes<Tag, 64> : BackwardSizesOf<4, 2, 64, 32, false> {};
template <class Tag>
struct BackwardSizes<Tag, 128> : BackwardSizesOf<8, 1, 32, 32, false> {};
template <class Tag>
struct BackwardSizes<Tag, 256> : BackwardSizesOf<4, 1, 16, 16, true> {};
template <>
struct BackwardSizes<Float32Tag, 64> : BackwardSizesOf<4, 1, 32, 16, false> {};
template <>
struct BackwardSizes<Float32Tag, 128> : BackwardSizesOf<4, 1, 16, 8, true> {};
template <>
struct BackwardSizes<Float32Tag, 256> : BackwardSizesOf<2, 1, 8, 8, true> {};

// Hides from the compiler that x is what it was. What is made of x in a loop is then made there, by an
// instruction or two, and not kept in registers from before the loop.
__device__ __forceinline__ int made_anew(int x) {
#ifndef PYPAR_SIMT
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Starts to copy the first num_rows (at most kRows) rows of a head into a tile; what is missing becomes 0.
// `begin` is the first row, `row_bytes` before the next; a head has head_bytes. A thread copies one 16-byte
// chunk of every kEvery-th row. Nothing is kept from one tile to the next: that would be registers which the
// sums need.
template <class Rows, int kRows, int kThreads>
__device__ __forceinline__ void start_copy(unsigned char* tile, const void* begin, int64_t row_bytes,
                                           int num_rows, int head_bytes) {
  constexpr int kEvery = kThreads / Rows::kChunks;
  static_assert(kThreads % Rows::kChunks == 0 && kRows % kEvery == 0, "every thread copies alike");
  const int thread = ptx::thread_index(), row = thread / Rows::kChunks, chunk = thread % Rows::kChunks;
  const int rows_left = chunk * 16 < head_bytes ? num_rows - row : 0;
  const unsigned char* from = static_cast<const unsigned char*>(begin) + row * row_bytes + chunk * 16;
#pragma unroll
  for (int i = 0; i < kRows / kEvery; ++i) {
    ptx::copy_async_16(tile + Rows::offset(row + i * kEvery, chunk), from, i * kEvery < rows_left);
    from += kEvery * row_bytes;
  }
}

// A warp's product: row and column tiles of 16 x 8. [0], [1] are at row lane / 4, columns 2 (lane % 4) and
// one more; [2], [3] 8 rows below.
template <int kRowTiles, int kColumnTiles>
using Product = float[kRowTiles][kColumnTiles][4];

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void set_zero(Product<kRowTiles, kColumnTiles>& product) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) product[m][n][e] = 0.0f;
    }
  }
}

// Products of tiles in shared memory, whose rows are `Rows`: kSize elements of a head.
template <class Tag, int kSize>
struct BackwardProducts {
  using Rows = Tile<kSize>;

  // What a lane of ldmatrix adds to a matrix's address: `outer` for a left operand, and for two right ones
  // that lie straight; `inner` for two right operands, 16 rows of 16 columns that lie transposed. 16 columns
  // further is an exclusive or with 32, since a chunk's place is one with the row. Made anew by each product:
  // kept, they and what is made of them would take up to 50 registers.
  static __device__ __forceinline__ int outer() {
    const int lane = ptx::thread_index() % kWarp;
    return Rows::offset(lane % 16, lane / 16);
  }
  static __device__ __forceinline__ int inner() {
    const int lane = ptx::thread_index() % kWarp;
    return Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // product = rows of `own` from first_row on, times rows of `streamed` from first_column on, over the head
  // size.
  template <int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void multiply(Product<kRowTiles, kColumnTiles>& product,
                                           const unsigned char* own, int first_row,
                                           const unsigned char* streamed, int first_column,
                                           bool /*scores*/) const {
    const int left = outer(), right = inner();
    set_zero(product);
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::load_matrix_x4(a[m], own + (first_row + 16 * m) * Rows::kRowBytes + (left ^ 32 * k));
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t b[4];
        ptx::load_matrix_x4(b, streamed + (first_column + 8 * n) * Rows::kRowBytes + (right ^ 32 * k));
        multiply_add(product, n, a, b);
      }
    }
  }

  // sum += weights, rounded to 16 bits, times rows of `streamed` from first_column on.
  template <int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void add(Product<kRowTiles, kSize / 8>& sum,
                                      const Product<kRowTiles, kColumnTiles>& weights,
                                      const unsigned char* streamed, int first_column) const {
    const int right = outer();
#pragma unroll
    for (int k = 0; k < kColumnTiles / 2; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&pair)[4] = weights[m][2 * k + i / 2];
          a[m][i] = ptx::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1], Tag{});
        }
      }
#pragma unroll
      for (int n = 0; n < kSize / 8; n += 2) {
        uint32_t b[4];
        ptx::load_matrix_trans_x4(b, streamed + (first_column + 16 * k) * Rows::kRowBytes + (right ^ 16 * n));
        multiply_add(sum, n, a, b);
      }
    }
  }

  // Column tiles n and n + 1 of the product += a times the two matrices of b.
  template <int kRowTiles, int kColumnTiles>
  static __device__ __forceinline__ void multiply_add(Product<kRowTiles, kColumnTiles>& product, int n,
                                                      const uint32_t (&a)[kRowTiles][4],
                                                      const uint32_t (&b)[4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t right[2] = {b[2 * i], b[2 * i + 1]};
        ptx::mma_m16n8k16(product[m][n + i], a[m], right, product[m][n + i], Tag{});
      }
    }
  }
};

// fp32, for which the tensor cores have no instruction of its precision: the same products, laid out alike,
// by multiply-adds. Sums are made of sums of 4 and of 8: the error grows with the length of a chain.
template <int kSize>
struct BackwardProducts<Float32Tag, kSize> {
  using Rows = Tile<2 * kSize>;

  // Four elements from `column` on, and two.
  static __device__ __forceinline__ float4 four(const unsigned char* tile, int row, int column) {
    return *reinterpret_cast<const float4*>(tile + Rows::offset(row, column / 4));
  }
  static __device__ __forceinline__ float2 two(const unsigned char* tile, int row, int column) {
    return *reinterpret_cast<const float2*>(tile + Rows::offset(row, column / 4) + column % 4 * 4);
  }

  // Scores are summed as the forward kernel does it, so that its lse fits them: of a row in which one key has
  // all the weight, P is 1 whatever the error of its score.
  template <int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void multiply(Product<kRowTiles, kColumnTiles>& product,
                                           const unsigned char* own, int first_row,
                                           const unsigned char* streamed, int first_column,
                                           bool scores) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    set_zero(product);
#pragma unroll 1
    for (int k = 0; k < kSize; k += 4) {
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const float4 a = four(own, first_row + 8 * i + lane / 4, k);
#pragma unroll
        for (int j = 0; j < 2 * kColumnTiles; ++j) {
          const float4 b = four(streamed, first_column + j / 2 * 8 + lane % 4 * 2 + j % 2, k);
          float& sum = product[i / 2][j / 2][i % 2 * 2 + j % 2];
          if (scores) {
            sum += a.x * b.x;
            sum += a.y * b.y;
            sum += a.z * b.z;
            sum += a.w * b.w;
          } else {
            sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
          }
        }
      }
    }
  }

  // The four lanes that share a row pass its weights round.
  template <int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void add(Product<kRowTiles, kSize / 8>& sum,
                                      const Product<kRowTiles, kColumnTiles>& weights,
                                      const unsigned char* streamed, int first_column) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      float weight[2 * kRowTiles][8];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          weight[i][j] = __shfl_sync(kAllLanes, weights[i / 2][tile][i % 2 * 2 + j % 2], j / 2, 4);
        }
      }
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        if (n % 4 == 0) __syncwarp();  // or loads of all n come first, and with them spills
        float2 part[2 * kRowTiles] = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 b = two(streamed, first_column + 8 * tile + j, 8 * n + lane % 4 * 2);
#pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i) {
            part[i].x = fmaf(weight[i][j], b.x, part[i].x);
            part[i].y = fmaf(weight[i][j], b.y, part[i].y);
          }
        }
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          sum[i / 2][n][i % 2 * 2] += part[i].x;
          sum[i / 2][n][i % 2 * 2 + 1] += part[i].y;
        }
      }
    }
  }
};

}  // namespace pypar::cuda
