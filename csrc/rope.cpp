// Rotary position embedding: contract and definition in pypar/ops/rope.py.
#include "core/registry.h"

namespace pypar {

struct Rope {
  const void* x;     // [batch, length, heads, 2 * half], any strides but 1 in the last dimension
  const float* cos;  // [length, half]
  const float* sin;
  void* out;  // [batch, length, heads, 2 * half], contiguous
  int64_t batch, length, heads, half;
  int64_t batch_stride, length_stride, head_stride;
  float direction;  // 1 turns by the angle, -1 turns back
  int element_type, num_threads;
};

PYPAR_KERNEL(rope, Rope)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/rows.h"

namespace pypar::PYPAR_ISA {

// All heads of one position.
template <class Element>
static void turn_position(const Rope& a, int64_t position) {
  const int64_t t = position % a.length;
  const Element* x =
      static_cast<const Element*>(a.x) + position / a.length * a.batch_stride + t * a.length_stride;
  Element* out = static_cast<Element*>(a.out) + position * a.heads * 2 * a.half;
  const float* cos = a.cos + t * a.half;
  const float* sin = a.sin + t * a.half;
  for (int64_t head = 0; head < a.heads; ++head) {
    for_vectors(a.half, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      const Float c = load_first(cos + i, count);
      const Float s = load_first(sin + i, count) * a.direction;
      const Float first = load_first(x + i, count);
      const Float second = load_first(x + a.half + i, count);
      store_first(out + i, first * c - second * s, count);
      store_first(out + a.half + i, second * c + first * s, count);
    });
    x += a.head_stride;
    out += 2 * a.half;
  }
}

void rope(const Rope& a) {
  by_element_type(a.element_type, [&](auto element) {
    const int64_t chunk = rows_per_chunk(a.heads * 2 * a.half);
    parallel_for(a.batch * a.length, chunk, a.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t position = begin; position < end; ++position)
        turn_position<decltype(element)>(a, position);
    });
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(rope) {
  module.def("rope",
             [](uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t out, int64_t batch, int64_t length,
                int64_t heads, int64_t half, int64_t batch_stride, int64_t length_stride, int64_t head_stride,
                float direction, int element_type, int num_threads) {
               pypar::launch<pypar::rope_kernels>(pypar::Rope{
                   reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(cos),
                   reinterpret_cast<const float*>(sin), reinterpret_cast<void*>(out), batch, length, heads,
                   half, batch_stride, length_stride, head_stride, direction, element_type, num_threads});
             });
}

#endif
