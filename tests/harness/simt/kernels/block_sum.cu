// out[row] = sum of a row: shuffles in each warp, then shared memory between warps. PYPAR_FAULT plants a
// fault.
#include <cstddef>
#include <cstdint>

namespace pypar::cuda {
void block_sum(const float* x, float* out, int rows, int columns, void* stream);
}

#ifndef PYPAR_BINDING

#  include "core/cuda_launch.h"
#  include "core/planted.h"

namespace pypar::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float warp_sum(float x) {
#  pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <int kNumWarps>
__device__ float sum_of_warps(float x) {
  __shared__ float sums[kNumWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (!planted("DIVERGENT_SHUFFLE") || lane < 16) x = warp_sum(x);
  if (planted("SHARED_OUT_OF_BOUNDS")) {
    if (lane == 0) sums[warp + 1] = x;
  } else if (planted("NEVER_WRITTEN")) {
    if (lane == 0 && warp > 0) sums[warp] = x;
  } else {
    if (lane == 0) sums[warp] = x;
  }
  if (planted("DIVERGENT_BARRIER")) {
    if (warp == 0) __syncthreads();
    if (warp != 0) {
      __syncthreads();
    }
  } else if (planted("BARRIER_NOT_REACHED")) {
    if (warp == 0) __syncthreads();
  } else if (!planted("RACE")) {
    __syncthreads();
  }
  x = lane < kNumWarps ? sums[lane] : 0.0f;
  if (!planted("RACE_AFTER_READ")) __syncthreads();  // the next row's sums come into the same place
  return warp_sum(x);
}

static __global__ void block_sum_kernel(const float* x, float* out, int rows, int columns) {
  for (int row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    float sum = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < columns; i += kThreads) {
      sum += x[static_cast<int64_t>(row) * columns + i];
    }
    sum = sum_of_warps<kWarps>(sum);
    if (threadIdx.x == 0) out[row] = sum;
  }
}

void block_sum(const float* x, float* out, int rows, int columns, void* stream) {
  launch(block_sum_kernel, dim3(2), dim3(kThreads), 0, stream, x, out, rows, columns);
}

}  // namespace pypar::cuda

#else

#  include "core/registry.h"

PYPAR_BIND(block_sum) {
  module.def("block_sum", [](uintptr_t x, uintptr_t out, int rows, int columns, uintptr_t stream) {
    pypar::cuda::block_sum(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), rows, columns,
                           reinterpret_cast<void*>(stream));
  });
}

#endif
