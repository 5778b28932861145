// Memory that the processes of one node map into each other's GPUs (CUDA IPC), in one form for nvcc and for
// the host runtime of the tests (PYPAR_SIMT), where all devices are one process and an address is its own
// handle.
#pragma once

#include <cstring>
#include <new>

#include "core/cuda_launch.h"

namespace pypar::cuda {

constexpr size_t kHandleBytes = 64;

#ifndef PYPAR_SIMT

// The calling thread's current device is `device` until the end of the block.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the CUDA device");
    if (device != before_) check(cudaSetDevice(device), "choosing the CUDA device");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Zeroed, and the zeros are there when the call returns.
inline void* allocate_device(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "allocating memory for peers");
  check(cudaMemset(memory, 0, bytes), "zeroing memory for peers");
  check(cudaDeviceSynchronize(), "zeroing memory for peers");
  return memory;
}
inline void free_device(void* memory) { check(cudaFree(memory), "freeing memory for peers"); }

// Host memory with one address for host and device; zeroed.
inline void* allocate_pinned(size_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped),
        "allocating host memory for a device");
  std::memset(memory, 0, bytes);
  return memory;
}
inline void free_pinned(void* memory) { check(cudaFreeHost(memory), "freeing host memory"); }

inline void export_memory(void* memory, unsigned char (&handle)[kHandleBytes]) {
  static_assert(sizeof(cudaIpcMemHandle_t) == kHandleBytes, "a handle is 64 bytes");
  cudaIpcMemHandle_t made;
  check(cudaIpcGetMemHandle(&made, memory), "making a handle of memory for peers");
  std::memcpy(handle, &made, kHandleBytes);
}
inline void* import_memory(const unsigned char* handle) {
  cudaIpcMemHandle_t given;
  std::memcpy(&given, handle, kHandleBytes);
  void* memory = nullptr;
  check(cudaIpcOpenMemHandle(&memory, given, cudaIpcMemLazyEnablePeerAccess), "opening a peer's memory");
  return memory;
}
inline void forget_memory(void* memory) { check(cudaIpcCloseMemHandle(memory), "closing a peer's memory"); }

// Between host and device memory, done when the call returns.
inline void copy_now(void* target, const void* source, size_t bytes) {
  check(cudaMemcpy(target, source, bytes, cudaMemcpyDefault), "copying memory");
}

#else  // PYPAR_SIMT

class OnDevice {
 public:
  explicit OnDevice(int) {}
  ~OnDevice() {}
};

inline void* allocate_device(size_t bytes) {
  constexpr size_t kAlign = 256;  // as cudaMalloc
  void* memory = ::operator new((bytes + kAlign - 1) / kAlign * kAlign, std::align_val_t{kAlign});
  std::memset(memory, 0, bytes);
  return memory;
}
inline void free_device(void* memory) { ::operator delete(memory, std::align_val_t{256}); }
inline void* allocate_pinned(size_t bytes) { return allocate_device(bytes); }
inline void free_pinned(void* memory) { free_device(memory); }
inline void export_memory(void* memory, unsigned char (&handle)[kHandleBytes]) {
  std::memset(handle, 0, kHandleBytes);
  std::memcpy(handle, &memory, sizeof memory);
}
inline void* import_memory(const unsigned char* handle) {
  void* memory = nullptr;
  std::memcpy(&memory, handle, sizeof memory);
  return memory;
}
inline void forget_memory(void*) {}
inline void copy_now(void* target, const void* source, size_t bytes) { std::memcpy(target, source, bytes); }

#endif  // PYPAR_SIMT

}  // namespace pypar::cuda
