// One warp (or block) does everything that the language offers; out[op][thread] is compared with its
// definition.
#include <cstddef>
#include <cstdint>

namespace pypar::cuda {
void warp_operations(const int* x, int* out, int* counts, void* stream);
void exchange(const int* x, int* out, void* stream);
void coordinates(int* out, void* stream);
void conversions(const float* x, uint32_t* bf16, uint32_t* f16, float* back, int count, void* stream);
}  // namespace pypar::cuda

#ifndef PYPAR_BINDING

#  include "core/cuda_launch.h"
#  include "core/planted.h"
#  include "core/ptx.h"

namespace pypar::cuda {

constexpr unsigned kAll = 0xffffffffu;

// 40 threads: the second warp has 8 lanes.
static __global__ void warp_operations_kernel(const int* x, int* out, int* counts) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int value = x[thread];
  int n = 0;
  const auto give = [&](int result) { out[n++ * 40 + thread] = result; };
  const unsigned mask = thread < 32 ? kAll : 0xffu;
  give(__shfl_sync(mask, value, lane ^ 3));
  give(__shfl_sync(mask, value, 5, 8));
  give(__shfl_up_sync(mask, value, 3));
  give(__shfl_up_sync(mask, value, 1, 4));
  give(__shfl_down_sync(mask, value, 1, 4));
  give(__shfl_xor_sync(mask, value, 5));
  give(__shfl_xor_sync(mask, value, 1, 2));
  const double wide = __shfl_xor_sync(mask, 1e10 * value, 1);
  give(static_cast<int>(wide / 1e10));
  give(static_cast<int>(__ballot_sync(mask, value > 0)));
  give(__any_sync(mask, value == 7));
  give(__all_sync(mask, value < 1000));
  give(__reduce_add_sync(mask, value));
  give(__reduce_max_sync(mask, value));
  give(static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(value))));
  if (lane % 2 == 0) {  // lanes that go different ways
    const unsigned evens = __ballot_sync(mask & 0x55555555u, value > 0);
    give(static_cast<int>(evens));
    give(static_cast<int>(__activemask()));
  } else {
    give(__shfl_xor_sync(mask & 0xaaaaaaaau, value, 2));
    give(static_cast<int>(__activemask()));
  }
  __syncwarp(mask);
  give(__syncthreads_count(value > 0));
  give(__syncthreads_and(value > 0));
  give(__syncthreads_or(value > 100));
  atomicAdd(&counts[0], value);
  atomicMax(&counts[1], value);
  atomicMin(&counts[2], value);
  give(atomicCAS(&counts[3], 0, 1) == 0);  // one thread of them all
  atomicOr(&counts[4], 1 << lane);
  atomicAdd(reinterpret_cast<float*>(&counts[5]), 0.5f);
}

// Pairs of lanes exchange through shared memory; only __syncwarp orders them.
static __global__ void exchange_kernel(const int* x, int* out) {
  __shared__ int values[64];
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = x[thread];
  const unsigned half = thread % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  if (planted("WRONG_MASK")) {
    __syncwarp(half);
    out[thread] = values[thread ^ 16];
  } else if (planted("SHUFFLE_IS_NO_BARRIER")) {
    const int other = __shfl_xor_sync(kAll, thread, 1);
    out[thread] = values[other];
  } else if (planted("LANE_NOT_IN_MASK")) {
    __syncwarp(0x0000ffffu);
    out[thread] = values[thread ^ 1];
  } else if (planted("OTHERS_MASK")) {
    __syncwarp(thread % 32 < 16 ? kAll : 0xffff0001u);
    out[thread] = values[thread ^ 1];
  } else if (planted("LOCAL_ARRAY")) {
    int copies[4] = {};
    for (int i = 0; i <= x[0] + 4; ++i) copies[i] = values[thread];
    out[thread] = copies[thread % 4];
  } else if (planted("TRAP")) {
    if (thread == 9) __trap();
  } else {
    __syncwarp(half);
    out[thread] = values[thread ^ 1];
  }
}

static __global__ void coordinates_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned place = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[place] = static_cast<int>(1000 * blockIdx.y + 100 * blockIdx.z + 10 * threadIdx.y + threadIdx.z);
}

static __global__ void conversions_kernel(const float* x, uint32_t* bf16, uint32_t* f16, float* back,
                                          int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  bf16[i] = ptx::pack_bf16(x[i], -x[i]);
  f16[i] = ptx::pack_f16(x[i], -x[i]);
  back[i] = ptx::unpack_f16(static_cast<uint16_t>(f16[i]));
}

void warp_operations(const int* x, int* out, int* counts, void* stream) {
  launch(warp_operations_kernel, dim3(1), dim3(40), 0, stream, x, out, counts);
}

void exchange(const int* x, int* out, void* stream) {
  launch(exchange_kernel, dim3(1), dim3(64), 0, stream, x, out);
}

void coordinates(int* out, void* stream) {
  launch(coordinates_kernel, dim3(2, 3, 4), dim3(5, 3, 2), 0, stream, out);
}

void conversions(const float* x, uint32_t* bf16, uint32_t* f16, float* back, int count, void* stream) {
  launch(conversions_kernel, dim3(static_cast<unsigned>(count + 255) / 256), dim3(256), 0, stream, x, bf16,
         f16, back, count);
}

}  // namespace pypar::cuda

#else

#  include "core/registry.h"

PYPAR_BIND(warp_operations) {
  using namespace pypar::cuda;
  module.def("warp_operations", [](uintptr_t x, uintptr_t out, uintptr_t counts, uintptr_t stream) {
    warp_operations(reinterpret_cast<const int*>(x), reinterpret_cast<int*>(out),
                    reinterpret_cast<int*>(counts), reinterpret_cast<void*>(stream));
  });
  module.def("exchange", [](uintptr_t x, uintptr_t out, uintptr_t stream) {
    exchange(reinterpret_cast<const int*>(x), reinterpret_cast<int*>(out), reinterpret_cast<void*>(stream));
  });
  module.def("coordinates", [](uintptr_t out, uintptr_t stream) {
    coordinates(reinterpret_cast<int*>(out), reinterpret_cast<void*>(stream));
  });
  module.def("conversions",
             [](uintptr_t x, uintptr_t bf16, uintptr_t f16, uintptr_t back, int count, uintptr_t stream) {
               conversions(reinterpret_cast<const float*>(x), reinterpret_cast<uint32_t*>(bf16),
                           reinterpret_cast<uint32_t*>(f16), reinterpret_cast<float*>(back), count,
                           reinterpret_cast<void*>(stream));
             });
}

#endif
