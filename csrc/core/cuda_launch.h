// How a kernel is launched, in one form for nvcc and for the host runtime of the tests (PYPAR_SIMT).
//
//   PYPAR_DYNAMIC_SHARED(memory);                              in a kernel: unsigned char* memory
//   launch(kernel, grid, block, shared_bytes, stream, args...)  the arguments convert to the kernel's
//   parameters
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef PYPAR_SIMT

#  include <cuda_runtime.h>

namespace pypar::cuda {

// One name in all kernels, so that each finds the same memory.
extern __shared__ __align__(128) unsigned char shared_memory[];

#  define PYPAR_DYNAMIC_SHARED(name) unsigned char* const name = ::pypar::cuda::shared_memory

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary) {
    throw std::runtime_error(std::string("no CUDA device can be used: ") + cudaGetErrorString(error));
  }
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Streaming multiprocessors of the current device.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "asking for the CUDA device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "asking for the CUDA device's size");
  return count;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {  // more than every GPU gives unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "asking for shared memory");
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Arguments&&>(arguments)...);
  check(cudaGetLastError(), "launching a kernel");
}

}  // namespace pypar::cuda

#else  // PYPAR_SIMT

namespace pypar::cuda {

// A small device, so that tests reach the split of keys over blocks.
inline int num_multiprocessors() { return 4; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  simt::launch(kernel, grid, block, shared_bytes, stream, static_cast<Arguments&&>(arguments)...);
}

}  // namespace pypar::cuda

#endif  // PYPAR_SIMT
