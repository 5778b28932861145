// activation(gate) * up: contract in pypar/ops/gated/__init__.py, definition in
// pypar/ops/gated/definition.py.
#include "core/registry.h"

namespace pypar {

// The order of ACTIVATIONS in pypar/ops/gated/definition.py.
enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kClampedSilu = 3 };

struct GatedForward {
  const void* gate;  // [rows, size], rows gate_stride apart; [rows, 2 * size], gate and up in turn, if pairs
  const void* up;    // [rows, size], rows up_stride apart; not read if pairs
  void* out;         // [rows, size]
  int64_t rows, size, gate_stride, up_stride;
  int activation;
  bool pairs;
  float alpha, limit;  // of the clamped activation
  int element_type, num_threads;
};

struct GatedBackward {
  const void* dout;  // [rows, size], rows dout_stride apart
  const void* gate;
  const void* up;
  void* dgate;  // like gate, rows dgate_stride apart
  void* dup;    // like up, rows dup_stride apart
  int64_t rows, size, dout_stride, gate_stride, up_stride, dgate_stride, dup_stride;
  int activation;
  bool pairs;
  float alpha, limit;
  int element_type, num_threads;
};

PYPAR_KERNEL(gated_forward, GatedForward)
PYPAR_KERNEL(gated_backward, GatedBackward)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/exponentials.h"

namespace pypar::PYPAR_ISA {

// An activation of gates, which are multiplied with its value, and its derivative. It may also bound up.
struct Activated {
  Float value, slope;
};

struct Unbounded {
  PYPAR_INLINE_MEMBER Float bounded(Float up) const { return up; }
  PYPAR_INLINE_MEMBER Float where_bounded(Float, Float gradient) const { return gradient; }
};

struct Silu : Unbounded {
  Silu(float, float) {}
  PYPAR_INLINE_MEMBER Float value(Float gate) const { return gate * sigmoid(gate).value; }
  PYPAR_INLINE_MEMBER Activated activated(Float gate) const {
    const Sigmoid s = sigmoid(gate);
    const Float value = gate * s.value;
    return {value, value * s.rest + s.value};
  }
};

// gate * P(z <= gate) for a standard normal z.
struct Gelu : Unbounded {
  Gelu(float, float) {}
  PYPAR_INLINE_MEMBER Float value(Float gate) const { return gate * standard_normal(gate).below; }
  PYPAR_INLINE_MEMBER Activated activated(Float gate) const {
    const Normal normal = standard_normal(gate);
    return {gate * normal.below, gate * normal.density + normal.below};
  }
};

// gate * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (gate + 0.044715 gate^3), which is gate * sigmoid(2 u).
struct GeluTanh : Unbounded {
  static constexpr float kLinear = 1.5957691216057308f, kCubic = kLinear * 0.044715f;  // of 2 u
  GeluTanh(float, float) {}
  PYPAR_INLINE_MEMBER Float value(Float gate) const {
    return gate * sigmoid(gate * (gate * gate * kCubic + kLinear)).value;
  }
  PYPAR_INLINE_MEMBER Activated activated(Float gate) const {
    Float square = gate * gate;
    // Beyond, the sigmoid is 0 or 1, and its slope must not be inf * 0.
    square = square > 1e4f ? broadcast(1e4f) : square;
    const Sigmoid s = sigmoid(gate * (square * kCubic + kLinear));
    const Float value = gate * s.value;
    return {value, value * s.rest * (square * (3 * kCubic) + kLinear) + s.value};
  }
};

// g * sigmoid(alpha * g) with g = min(gate, limit), to be multiplied with 1 + up within [-limit, limit].
struct ClampedSilu {
  float alpha, limit;
  ClampedSilu(float alpha, float limit) : alpha(alpha), limit(limit) {}
  PYPAR_INLINE_MEMBER Float below_limit(Float x) const { return x > limit ? broadcast(limit) : x; }
  PYPAR_INLINE_MEMBER Float value(Float gate) const {
    gate = below_limit(gate);
    return gate * sigmoid(gate * alpha).value;
  }
  PYPAR_INLINE_MEMBER Activated activated(Float gate) const {
    const Float bounded = below_limit(gate);
    const Sigmoid s = sigmoid(bounded * alpha);
    const Float value = bounded * s.value;
    return {value, select(gate <= limit, value * s.rest * alpha + s.value, zero())};
  }
  PYPAR_INLINE_MEMBER Float bounded(Float up) const {
    return (up < -limit ? broadcast(-limit) : below_limit(up)) + 1.0f;
  }
  PYPAR_INLINE_MEMBER Float where_bounded(Float up, Float gradient) const {
    return select((up >= -limit) & (up <= limit), gradient, zero());
  }
};

// Where a row's gates and ups are: in two rows, or in turn in one.
template <class Element>
struct Apart {
  static PYPAR_INLINE_MEMBER Pair load(const Element* gate, const Element* up, int64_t i, int64_t count) {
    return {load_first(gate + i, count), load_first(up + i, count)};
  }
  static PYPAR_INLINE_MEMBER void store(Element* gate, Element* up, int64_t i, int64_t count, Pair x) {
    store_first(gate + i, x.even, count);
    store_first(up + i, x.odd, count);
  }
};

template <class Element>
struct InTurn {
  static PYPAR_INLINE_MEMBER Pair load(const Element* gate, const Element*, int64_t i, int64_t count) {
    return load_first_pairs(gate + 2 * i, count);
  }
  static PYPAR_INLINE_MEMBER void store(Element* gate, Element*, int64_t i, int64_t count, Pair x) {
    store_first_pairs(gate + 2 * i, x, count);
  }
};

template <class Element, template <class> class Operands, class Activation>
static void forward_row(const GatedForward& a, int64_t row, const Activation& activation) {
  const Element* gate = static_cast<const Element*>(a.gate) + row * a.gate_stride;
  const Element* up = static_cast<const Element*>(a.up) + row * a.up_stride;
  Element* out = static_cast<Element*>(a.out) + row * a.size;
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Pair x = Operands<Element>::load(gate, up, i, count);
    store_first(out + i, activation.value(x.even) * activation.bounded(x.odd), count);
  });
}

template <class Element, template <class> class Operands, class Activation>
static void backward_row(const GatedBackward& a, int64_t row, const Activation& activation) {
  const Element* dout = static_cast<const Element*>(a.dout) + row * a.dout_stride;
  const Element* gate = static_cast<const Element*>(a.gate) + row * a.gate_stride;
  const Element* up = static_cast<const Element*>(a.up) + row * a.up_stride;
  Element* dgate = static_cast<Element*>(a.dgate) + row * a.dgate_stride;
  Element* dup = static_cast<Element*>(a.dup) + row * a.dup_stride;
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Float d = load_first(dout + i, count);
    const Pair x = Operands<Element>::load(gate, up, i, count);
    const Activated found = activation.activated(x.even);
    const Pair gradient = {d * activation.bounded(x.odd) * found.slope,
                           activation.where_bounded(x.odd, d * found.value)};
    Operands<Element>::store(dgate, dup, i, count, gradient);
  });
}

// run(activation) with a value of the C++ type that a.activation names.
template <class Arguments, class Run>
PYPAR_INLINE void by_activation(const Arguments& a, const Run& run) {
  switch (a.activation) {
    case kGelu:
      run(Gelu(a.alpha, a.limit));
      break;
    case kGeluTanh:
      run(GeluTanh(a.alpha, a.limit));
      break;
    case kClampedSilu:
      run(ClampedSilu(a.alpha, a.limit));
      break;
    default:
      run(Silu(a.alpha, a.limit));
      break;
  }
}

void gated_forward(const GatedForward& a) {
  by_activation(a, [&](const auto& activation) {
    if (a.pairs) {
      for_rows(
          a, [&](auto element, int64_t row) { forward_row<decltype(element), InTurn>(a, row, activation); });
    } else {
      for_rows(a,
               [&](auto element, int64_t row) { forward_row<decltype(element), Apart>(a, row, activation); });
    }
  });
}

void gated_backward(const GatedBackward& a) {
  by_activation(a, [&](const auto& activation) {
    if (a.pairs) {
      for_rows(
          a, [&](auto element, int64_t row) { backward_row<decltype(element), InTurn>(a, row, activation); });
    } else {
      for_rows(
          a, [&](auto element, int64_t row) { backward_row<decltype(element), Apart>(a, row, activation); });
    }
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(gated) {
  module.def("gated_forward", [](uintptr_t gate, uintptr_t up, uintptr_t out, int64_t rows, int64_t size,
                                 int64_t gate_stride, int64_t up_stride, int activation, bool pairs,
                                 float alpha, float limit, int element_type, int num_threads) {
    pypar::launch<pypar::gated_forward_kernels>(pypar::GatedForward{
        reinterpret_cast<const void*>(gate), reinterpret_cast<const void*>(up), reinterpret_cast<void*>(out),
        rows, size, gate_stride, up_stride, activation, pairs, alpha, limit, element_type, num_threads});
  });
  module.def("gated_backward",
             [](uintptr_t dout, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup, int64_t rows,
                int64_t size, int64_t dout_stride, int64_t gate_stride, int64_t up_stride,
                int64_t dgate_stride, int64_t dup_stride, int activation, bool pairs, float alpha,
                float limit, int element_type, int num_threads) {
               pypar::launch<pypar::gated_backward_kernels>(pypar::GatedBackward{
                   reinterpret_cast<const void*>(dout), reinterpret_cast<const void*>(gate),
                   reinterpret_cast<const void*>(up), reinterpret_cast<void*>(dgate),
                   reinterpret_cast<void*>(dup), rows, size, dout_stride, gate_stride, up_stride,
                   dgate_stride, dup_stride, activation, pairs, alpha, limit, element_type, num_threads});
             });
}

#endif
