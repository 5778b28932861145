// A message from device to device: device r waits for word r - 1, passes the message on by setting word r,
// and the last one reads what the first one wrote. Every thread writes and reads one element. `rules` says
// which of the rules are kept.
#include <cstddef>
#include <cstdint>

namespace pypar::cuda {
void pass_message(int* data, int* out, uint32_t* words, int rank, int num_ranks, int rules, void* stream);
}

#ifndef PYPAR_BINDING

#  include "core/cuda_launch.h"
#  include "core/ptx.h"

namespace pypar::cuda {

constexpr int kRelease = 1, kAcquire = 2, kBarrierBefore = 4, kBarrierAfter = 8;

__global__ void pass_message_kernel(int* data, int* out, uint32_t* words, int rank, int num_ranks,
                                    int rules) {
  const int thread = static_cast<int>(threadIdx.x);
  if (rank == 0) data[thread] = thread + 1;
  if ((rules & kBarrierBefore) != 0) __syncthreads();
  if (thread == 0) {
    if (rank > 0) {
      const auto load = (rules & kAcquire) != 0 ? &ptx::load_acquire_system : &ptx::load_relaxed_system;
      while (load(words + rank - 1) == 0) {
      }
    }
    ((rules & kRelease) != 0 ? &ptx::store_release_system : &ptx::store_relaxed_system)(words + rank, 1u);
  }
  if ((rules & kBarrierAfter) != 0) __syncthreads();
  if (rank == num_ranks - 1) out[thread] = data[thread];
}

void pass_message(int* data, int* out, uint32_t* words, int rank, int num_ranks, int rules, void* stream) {
  launch(&pass_message_kernel, dim3(1), dim3(64), 0, stream, data, out, words, rank, num_ranks, rules);
}

}  // namespace pypar::cuda

#else

#  include "core/registry.h"

PYPAR_BIND(messages) {
  module.def("pass_message", [](uintptr_t data, uintptr_t out, uintptr_t words, int rank, int num_ranks,
                                int rules, uintptr_t stream) {
    pypar::cuda::pass_message(reinterpret_cast<int*>(data), reinterpret_cast<int*>(out),
                              reinterpret_cast<uint32_t*>(words), rank, num_ranks, rules,
                              reinterpret_cast<void*>(stream));
  });
}

#endif
