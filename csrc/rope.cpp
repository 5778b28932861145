// Rotary position embedding: contract in pypar/ops/rope/__init__.py, definition in
// pypar/ops/rope/definition.py.
#include "core/registry.h"

namespace pypar {

struct RopeHeads {
  const void* x;  // [batch, length, heads, head_size], any strides but 1 in the last dimension
  void* out;      // the same, elsewhere or in place
  int64_t heads;
  int64_t batch_stride, length_stride, head_stride;
  int64_t out_batch_stride, out_length_stride, out_head_stride;
};

struct Rope {
  RopeHeads q, k;            // k has 0 heads where there is none
  const float* cos;          // [rows, pairs]
  const float* sin;          // [rows, pairs]
  const int64_t* positions;  // [batch, length], rows of cos and sin; null: row b * table_stride + t
  int64_t batch, length, head_size, pairs, table_stride;
  bool interleaved;
  float direction;  // 1 turns by the angle, -1 turns back
  int element_type, num_threads;
};

PYPAR_KERNEL(rope, Rope)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/rows.h"

namespace pypar::PYPAR_ISA {

PYPAR_INLINE Pair turned(Pair x, Float cos, Float sin) {
  return {x.even * cos - x.odd * sin, x.odd * cos + x.even * sin};
}

// The heads of one position.
template <class Element, bool kInterleaved>
static void turn_heads(const Rope& a, const RopeHeads& heads, int64_t b, int64_t t, int64_t row) {
  const Element* x = static_cast<const Element*>(heads.x) + b * heads.batch_stride + t * heads.length_stride;
  Element* out = static_cast<Element*>(heads.out) + b * heads.out_batch_stride + t * heads.out_length_stride;
  const float* cos = a.cos + row * a.pairs;
  const float* sin = a.sin + row * a.pairs;
  const int64_t half = a.pairs, rotary = 2 * a.pairs;
  for (int64_t head = 0; head < heads.heads; ++head) {
    for_vectors(a.pairs, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      const Float c = load_first(cos + i, count), s = load_first(sin + i, count) * a.direction;
      if (kInterleaved) {
        store_first_pairs(out + 2 * i, turned(load_first_pairs(x + 2 * i, count), c, s), count);
      } else {
        const Pair y = turned({load_first(x + i, count), load_first(x + half + i, count)}, c, s);
        store_first(out + i, y.even, count);
        store_first(out + half + i, y.odd, count);
      }
    });
    if (out != x) std::memcpy(out + rotary, x + rotary, sizeof(Element) * (a.head_size - rotary));
    x += heads.head_stride;
    out += heads.out_head_stride;
  }
}

template <class Element, bool kInterleaved>
static void turn_positions(const Rope& a, int64_t begin, int64_t end) {
  for (int64_t position = begin; position < end; ++position) {
    const int64_t b = position / a.length, t = position % a.length;
    const int64_t row = a.positions ? a.positions[position] : b * a.table_stride + t;
    turn_heads<Element, kInterleaved>(a, a.q, b, t, row);
    turn_heads<Element, kInterleaved>(a, a.k, b, t, row);
  }
}

void rope(const Rope& a) {
  by_element_type(a.element_type, [&](auto element) {
    const int64_t chunk = rows_per_chunk((a.q.heads + a.k.heads) * a.head_size);
    parallel_for(a.batch * a.length, chunk, a.num_threads, [&](int64_t begin, int64_t end) {
      if (a.interleaved) {
        turn_positions<decltype(element), true>(a, begin, end);
      } else {
        turn_positions<decltype(element), false>(a, begin, end);
      }
    });
  });
}

}  // namespace pypar::PYPAR_ISA

#else

#  include <pybind11/stl.h>

#  include <array>
#  include <optional>
#  include <tuple>

namespace pypar {

using Strides = std::array<int64_t, 3>;
using HeadsTuple = std::tuple<uintptr_t, uintptr_t, int64_t, Strides, Strides>;

static RopeHeads heads_of(const HeadsTuple& given) {
  const auto& [x, out, heads, stride, out_stride] = given;
  return {reinterpret_cast<const void*>(x),
          reinterpret_cast<void*>(out),
          heads,
          stride[0],
          stride[1],
          stride[2],
          out_stride[0],
          out_stride[1],
          out_stride[2]};
}

}  // namespace pypar

PYPAR_BIND(rope) {
  module.def("rope", [](const pypar::HeadsTuple& q, const std::optional<pypar::HeadsTuple>& k, uintptr_t cos,
                        uintptr_t sin, uintptr_t positions, int64_t batch, int64_t length, int64_t head_size,
                        int64_t pairs, int64_t table_stride, bool interleaved, float direction,
                        int element_type, int num_threads) {
    pypar::launch<pypar::rope_kernels>(pypar::Rope{
        pypar::heads_of(q), k ? pypar::heads_of(*k) : pypar::RopeHeads{}, reinterpret_cast<const float*>(cos),
        reinterpret_cast<const float*>(sin), reinterpret_cast<const int64_t*>(positions), batch, length,
        head_size, pairs, table_stride, interleaved, direction, element_type, num_threads});
  });
}

#endif
