// Layer normalisation: contract in pypar/ops/layer_norm.py.
#include "core/norm.h"

namespace pypar {

PYPAR_KERNEL(layer_norm_forward, NormForward)
PYPAR_KERNEL(layer_norm_backward, NormBackward)

}  // namespace pypar

#ifndef PYPAR_BINDING

namespace pypar::PYPAR_ISA {

void layer_norm_forward(const NormForward& a) { norm_forward<true>(a); }
void layer_norm_backward(const NormBackward& a) { norm_backward<true>(a); }

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(layer_norm) {
  pypar::bind_norm_forward<pypar::layer_norm_forward_kernels>(module, "layer_norm_forward");
  pypar::bind_norm_backward<pypar::layer_norm_backward_kernels>(module, "layer_norm_backward");
}

#endif
