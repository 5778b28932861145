// c = a b of 16-bit matrices in fp32, 64 x 64 tiles: cp.async into two buffers, ldmatrix, mma. a [M, K] and b
// [K, N] are contiguous; K and N are multiples of 8. PYPAR_FAULT plants a fault.
#include <cstddef>
#include <cstdint>

namespace pypar::cuda {
void tile_product(const void* a, const void* b, float* c, int M, int N, int K, bool bf16, void* stream);
}

#ifndef PYPAR_BINDING

#  include "core/cuda_launch.h"
#  include "core/planted.h"
#  include "core/ptx.h"

namespace pypar::cuda {

constexpr int kTile = 64;
constexpr int kDepth = 32;
constexpr int kStrideA = kDepth + 8;  // elements from row to row: rows fall into different banks
constexpr int kStrideB = kTile + 8;
constexpr int kThreads = 128;
constexpr int kBufferElements = kTile * kStrideA + kDepth * kStrideB;

// One step's part of a and b, as 16-byte pieces; zeros outside the matrices.
__device__ __forceinline__ void load_step(uint16_t* buffer, const uint16_t* a, const uint16_t* b, int M,
                                          int N, int K, int row0, int column0, int k0) {
  for (int piece = static_cast<int>(threadIdx.x); piece < kTile * kDepth / 8; piece += kThreads) {
    const int row = piece / (kDepth / 8), k = piece % (kDepth / 8) * 8;
    const bool valid = row0 + row < M && k0 + k < K;
    const int64_t element = static_cast<int64_t>(row0 + row) * K + k0 + k, from = valid ? element : 0;
    if (planted("COPY_OUT_OF_BOUNDS")) {
      ptx::copy_async_16(buffer + row * kStrideA + k, a + element, true);
    } else {
      ptx::copy_async_16(buffer + row * kStrideA + k, a + from, valid);
    }
  }
  uint16_t* const b_tile = buffer + kTile * kStrideA;
  for (int piece = static_cast<int>(threadIdx.x); piece < kDepth * kTile / 8; piece += kThreads) {
    const int k = piece / (kTile / 8), column = piece % (kTile / 8) * 8;
    const bool valid = k0 + k < K && column0 + column < N;
    const int64_t from = valid ? static_cast<int64_t>(k0 + k) * N + column0 + column : 0;
    ptx::copy_async_16(b_tile + k * kStrideB + column, b + from, valid);
  }
}

// Each of the 4 warps makes 16 rows of the tile.
template <class Tag>
static __global__ void __launch_bounds__(kThreads)
    tile_product_kernel(const uint16_t* a, const uint16_t* b, float* c, int M, int N, int K) {
  PYPAR_DYNAMIC_SHARED(memory);
  uint16_t* const buffers = reinterpret_cast<uint16_t*>(memory);
  const int row0 = static_cast<int>(blockIdx.y) * kTile, column0 = static_cast<int>(blockIdx.x) * kTile;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float sums[kTile / 8][4] = {};
  const int steps = (K + kDepth - 1) / kDepth;
  load_step(buffers, a, b, M, N, K, row0, column0, 0);
  ptx::copy_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      uint16_t* const next = buffers + (planted("ONE_BUFFER") ? 0 : (step + 1) % 2 * kBufferElements);
      load_step(next, a, b, M, N, K, row0, column0, (step + 1) * kDepth);
    }
    ptx::copy_async_commit();
    if (planted("MISSING_WAIT")) {
      ptx::copy_async_wait<2>();
    } else {
      ptx::copy_async_wait<1>();
    }
    if (!planted("NO_BARRIER_BEFORE")) __syncthreads();
    const uint16_t* const a_tile = buffers + step % 2 * kBufferElements;
    const uint16_t* const b_tile = a_tile + kTile * kStrideA;
#  pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a_part[4];
      if (planted("ROW_MISALIGNED")) {
        ptx::load_matrix_x4(a_part, a_tile + (16 * warp + lane % 16) * kStrideA + k + lane / 16 * 4);
      } else if (planted("ROW_OUT_OF_BOUNDS")) {
        ptx::load_matrix_x4(a_part, a_tile + (16 * warp + lane % 16 + 256) * kStrideA + k + lane / 16 * 8);
      } else if (planted("PADDING_READ")) {
        ptx::load_matrix_x4(a_part, a_tile + (16 * warp + lane % 16) * kStrideA + k + lane / 16 * 8 + 8);
      } else {
        ptx::load_matrix_x4(a_part, a_tile + (16 * warp + lane % 16) * kStrideA + k + lane / 16 * 8);
      }
#  pragma unroll
      for (int n = 0; n < kTile; n += 16) {
        uint32_t b_part[4];
        ptx::load_matrix_trans_x4(b_part, b_tile + (k + lane % 16) * kStrideB + n + lane / 16 * 8);
        const uint32_t left[2] = {b_part[0], b_part[1]}, right[2] = {b_part[2], b_part[3]};
        ptx::mma_m16n8k16(sums[n / 8], a_part, left, sums[n / 8], Tag{});
        if (planted("DIVERGENT_MMA") && lane == 0) continue;
        ptx::mma_m16n8k16(sums[n / 8 + 1], a_part, right, sums[n / 8 + 1], Tag{});
      }
    }
    if (!planted("NO_BARRIER_AFTER")) __syncthreads();
  }
  for (int n = 0; n < kTile / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + 16 * warp + lane / 4 + i / 2 * 8,
                column = column0 + 8 * n + lane % 4 * 2 + i % 2;
      if (row < M && column < N) c[static_cast<int64_t>(row) * N + column] = sums[n][i];
    }
  }
}

void tile_product(const void* a, const void* b, float* c, int M, int N, int K, bool bf16, void* stream) {
  const dim3 grid(static_cast<unsigned>(N + kTile - 1) / kTile, static_cast<unsigned>(M + kTile - 1) / kTile);
  const auto kernel = bf16 ? tile_product_kernel<ptx::BFloat16Tag> : tile_product_kernel<ptx::Float16Tag>;
  launch(kernel, grid, dim3(kThreads), 2 * kBufferElements * sizeof(uint16_t), stream,
         static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), c, M, N, K);
}

}  // namespace pypar::cuda

#else

#  include "core/registry.h"

PYPAR_BIND(tile_product) {
  module.def("tile_product", [](uintptr_t a, uintptr_t b, uintptr_t c, int M, int N, int K, bool bf16,
                                uintptr_t stream) {
    pypar::cuda::tile_product(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                              reinterpret_cast<float*>(c), M, N, K, bf16, reinterpret_cast<void*>(stream));
  });
}

#endif
