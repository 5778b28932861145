// out = a + b, and the faults of threads that do not know each other. PYPAR_FAULT plants one.
#include <cstddef>
#include <cstdint>

namespace pypar::cuda {
void vector_add(const float* a, const float* b, float* out, int count, void* stream);
}

#ifndef PYPAR_BINDING

#  include "core/cuda_launch.h"
#  include "core/planted.h"

namespace pypar::cuda {

static __global__ void vector_add_kernel(const float* a, const float* b, float* out, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count + (planted("OUT_OF_BOUNDS") ? 1 : 0)) return;
  if (planted("INPUT_WRITTEN")) {
    const_cast<float*>(a)[i] = 0.0f;
  } else if (planted("MISALIGNED")) {
    const float2 pair = *reinterpret_cast<const float2*>(a + 1);
    out[i] = pair.x + b[i];
  } else if (planted("BLOCKS_RACE")) {
    out[threadIdx.x] = a[i] + b[i];
  } else if (planted("BLOCKS_READ")) {
    out[i] = a[i] + (i >= static_cast<int>(blockDim.x) ? out[i - 1] : 0.0f);
  } else {
    out[i] = a[i] + b[i];
  }
}

void vector_add(const float* a, const float* b, float* out, int count, void* stream) {
  launch(vector_add_kernel, dim3(static_cast<unsigned>(count + 127) / 128), dim3(128), 0, stream, a, b, out,
         count);
}

}  // namespace pypar::cuda

#else

#  include "core/registry.h"

PYPAR_BIND(vector_add) {
  module.def("vector_add", [](uintptr_t a, uintptr_t b, uintptr_t out, int count, uintptr_t stream) {
    pypar::cuda::vector_add(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                            reinterpret_cast<float*>(out), count, reinterpret_cast<void*>(stream));
  });
}

#endif
