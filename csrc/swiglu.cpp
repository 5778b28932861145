// silu(gate) * up: contract and definition in pypar/ops/swiglu.py.
#include "core/registry.h"

namespace pypar {

struct SwigluForward {
  const void* gate;  // [rows, size], rows gate_stride apart
  const void* up;    // [rows, size], rows up_stride apart
  void* out;         // [rows, size]
  int64_t rows, size, gate_stride, up_stride;
  int element_type, num_threads;
};

struct SwigluBackward {
  const void* dout;  // [rows, size], rows dout_stride apart
  const void* gate;
  const void* up;
  void* dgate;  // [rows, size]
  void* dup;    // [rows, size]
  int64_t rows, size, dout_stride, gate_stride, up_stride;
  int element_type, num_threads;
};

PYPAR_KERNEL(swiglu_forward, SwigluForward)
PYPAR_KERNEL(swiglu_backward, SwigluBackward)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/rows.h"

namespace pypar::PYPAR_ISA {

PYPAR_INLINE Float sigmoid(Float x) { return 1.0f / (exp(-x) + 1.0f); }

template <class Element>
static void forward_row(const SwigluForward& a, int64_t row) {
  const Element* gate = static_cast<const Element*>(a.gate) + row * a.gate_stride;
  const Element* up = static_cast<const Element*>(a.up) + row * a.up_stride;
  Element* out = static_cast<Element*>(a.out) + row * a.size;
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Float g = load_first(gate + i, count);
    store_first(out + i, g / (exp(-g) + 1.0f) * load_first(up + i, count), count);
  });
}

template <class Element>
static void backward_row(const SwigluBackward& a, int64_t row) {
  const Element* dout = static_cast<const Element*>(a.dout) + row * a.dout_stride;
  const Element* gate = static_cast<const Element*>(a.gate) + row * a.gate_stride;
  const Element* up = static_cast<const Element*>(a.up) + row * a.up_stride;
  Element* dgate = static_cast<Element*>(a.dgate) + row * a.size;
  Element* dup = static_cast<Element*>(a.dup) + row * a.size;
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Float d = load_first(dout + i, count);
    const Float g = load_first(gate + i, count);
    const Float s = sigmoid(g);
    store_first(dup + i, d * (g * s), count);
    store_first(dgate + i, d * load_first(up + i, count) * (s * (g * (1.0f - s) + 1.0f)), count);
  });
}

void swiglu_forward(const SwigluForward& a) {
  for_rows(a, [&](auto element, int64_t row) { forward_row<decltype(element)>(a, row); });
}

void swiglu_backward(const SwigluBackward& a) {
  for_rows(a, [&](auto element, int64_t row) { backward_row<decltype(element)>(a, row); });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(swiglu) {
  module.def("swiglu_forward", [](uintptr_t gate, uintptr_t up, uintptr_t out, int64_t rows, int64_t size,
                                  int64_t gate_stride, int64_t up_stride, int element_type, int num_threads) {
    pypar::launch<pypar::swiglu_forward_kernels>(pypar::SwigluForward{
        reinterpret_cast<const void*>(gate), reinterpret_cast<const void*>(up), reinterpret_cast<void*>(out),
        rows, size, gate_stride, up_stride, element_type, num_threads});
  });
  module.def(
      "swiglu_backward", [](uintptr_t dout, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup,
                            int64_t rows, int64_t size, int64_t dout_stride, int64_t gate_stride,
                            int64_t up_stride, int element_type, int num_threads) {
        pypar::launch<pypar::swiglu_backward_kernels>(pypar::SwigluBackward{
            reinterpret_cast<const void*>(dout), reinterpret_cast<const void*>(gate),
            reinterpret_cast<const void*>(up), reinterpret_cast<void*>(dgate), reinterpret_cast<void*>(dup),
            rows, size, dout_stride, gate_stride, up_stride, element_type, num_threads});
      });
}

#endif
