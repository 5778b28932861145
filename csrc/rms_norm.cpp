// Root mean square normalisation: contract in pypar/ops/rms_norm.py.
#include "core/norm.h"

namespace pypar {

PYPAR_KERNEL(rms_norm_forward, NormForward)
PYPAR_KERNEL(rms_norm_backward, NormBackward)

}  // namespace pypar

#ifndef PYPAR_BINDING

namespace pypar::PYPAR_ISA {

void rms_norm_forward(const NormForward& a) { norm_forward<false>(a); }
void rms_norm_backward(const NormBackward& a) { norm_backward<false>(a); }

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(rms_norm) {
  pypar::bind_norm_forward<pypar::rms_norm_forward_kernels>(module, "rms_norm_forward");
  pypar::bind_norm_backward<pypar::rms_norm_backward_kernels>(module, "rms_norm_backward");
}

#endif
