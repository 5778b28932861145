// The module pypar._cuda: the bindings of every op's GPU kernels. Like module.cpp it is compiled once, by the
// C++ compiler with -DPYPAR_BINDING.
#include "core/registry.h"

namespace py = pybind11;

namespace pypar {
namespace {
Binding* first_binding = nullptr;
}  // namespace

Binding::Binding(void (*define_names)(py::module_&)) : define(define_names), next(first_binding) {
  first_binding = this;
}

}  // namespace pypar

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "pypar's GPU kernels. Tensors are passed as addresses, shapes and strides in elements.";
  // What the kernels were compiled for, as in "80 90a compute_80": machine code, then code for later GPUs.
  module.attr("architectures") = PYPAR_CUDA_ARCHITECTURES;
  for (auto* binding = pypar::first_binding; binding != nullptr; binding = binding->next) {
    binding->define(module);
  }
}
