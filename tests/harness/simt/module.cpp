// The Python module of kernels under the host runtime: the ops' own bindings, and the runtime's switches.
#define PYPAR_BINDING
#include <pybind11/stl.h>

#include <stdexcept>

#include "core/registry.h"
#include "memory.h"

namespace py = pybind11;

namespace pypar {

namespace {
Binding* first_binding = nullptr;
}

Binding::Binding(void (*define_names)(py::module_&)) : define(define_names), next(first_binding) {
  first_binding = this;
}

}  // namespace pypar

namespace {

simt::Order order_of(const std::string& name) {
  if (name == "linear") return simt::Order::kLinear;
  if (name == "reverse") return simt::Order::kReverse;
  if (name == "random") return simt::Order::kRandom;
  throw py::value_error("an order is linear, reverse or random, not " + name);
}

void set_options(const std::string& block_order, const std::string& thread_order, uint64_t seed,
                 bool early_copies, unsigned max_findings, bool concurrent) {
  if (max_findings == 0) throw py::value_error("max_findings must be positive");
  simt::machine.options = {order_of(block_order), order_of(thread_order), seed,
                           early_copies,          max_findings,           concurrent};
}

py::dict counters() {
  const simt::Counters& c = simt::machine.counters;
  py::dict all;
  all["launches"] = c.launches;
  all["blocks"] = c.blocks;
  all["barriers"] = c.barriers;
  all["warp_syncs"] = c.warp_syncs;
  all["shuffles"] = c.shuffles;
  all["mma"] = c.mma;
  all["load_matrix"] = c.load_matrix;
  all["load_matrix_conflicts"] = c.load_matrix_conflicts;
  all["copies"] = c.copies;
  return all;
}

}  // namespace

PYBIND11_MODULE(simt, module) {
  module.doc() =
      "Kernels of csrc/*.cu on the CPU, thread by thread. A fault is a RuntimeError from the launch.";
  module.def(
      "register_buffer",
      [](uintptr_t address, size_t bytes, size_t element_bytes, bool writable, const std::string& name,
         bool shared) { simt::register_buffer(address, bytes, element_bytes, writable, name, shared); },
      py::arg("address"), py::arg("bytes"), py::arg("element_bytes") = 1, py::arg("writable") = true,
      py::arg("name") = "", py::arg("shared") = false,
      "Memory that kernels may touch; nothing else in global memory is theirs. shared: by several devices.");
  module.def("clear_buffers", &simt::clear_buffers);
  module.def("set_options", &set_options, py::arg("block_order") = "linear",
             py::arg("thread_order") = "linear", py::arg("seed") = 0, py::arg("early_copies") = false,
             py::arg("max_findings") = 20, py::arg("concurrent") = false);
  module.def("counters", &counters,
             "What kernels did since reset_counters; instructions are counted by warps.");
  module.def("reset_counters", [] { simt::machine.counters = {}; });
  module.def("static_shared_bytes", &simt::static_shared_bytes, "Of all kernels of the module together.");
  module.def("create_stream", [] {
    cudaStream_t stream = nullptr;
    cudaStreamCreate(&stream);
    return reinterpret_cast<uintptr_t>(stream);
  });
  module.def("destroy_stream",
             [](uintptr_t stream) { cudaStreamDestroy(reinterpret_cast<cudaStream_t>(stream)); });
  module.def("synchronize",
             [](uintptr_t stream) { cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(stream)); });
  for (auto* binding = pypar::first_binding; binding != nullptr; binding = binding->next)
    binding->define(module);
}
