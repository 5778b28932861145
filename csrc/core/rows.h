// Loops along one row, for the operators that work on the last dimension.
#pragma once

#include "core/parallel.h"
#include "core/simd.h"

#define PYPAR_INLINE_LAMBDA __attribute__((always_inline))

namespace pypar::PYPAR_ISA {

// Elements that a thread takes at once: enough that taking them (an atomic addition) costs nothing beside the
// work.
constexpr int64_t kChunkElements = 32768;

PYPAR_INLINE int64_t rows_per_chunk(int64_t row_elements) {
  return larger(1, kChunkElements / larger(1, row_elements));
}

// The first `count` <= kWidth elements; the other lanes are zero.
template <class Element>
PYPAR_INLINE Float load_first(const Element* p, int64_t count) {
  return count == kWidth ? load(p) : load_partial(p, count);
}

template <class Element>
PYPAR_INLINE void store_first(Element* p, Float x, int64_t count) {
  if (count == kWidth) {
    store(p, x);
  } else {
    store_partial(p, x, count);
  }
}

// body(i, count) for the vectors that start at i and together are [0, size); count is kWidth but for the
// last.
template <class Body>
PYPAR_INLINE void for_vectors(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(i, int64_t{kWidth});
  if (i < size) body(i, size - i);
}

// The sum of term(i, count), whose lanes from count on are zero, over [0, size), in an order given by size
// alone.
template <class Term>
PYPAR_INLINE float sum_over(int64_t size, const Term& term) {
  Float sums[4] = {};  // four, so that an addition need not wait for the one before
  int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
    for (int part = 0; part < 4; ++part) sums[part] += term(i + part * kWidth, int64_t{kWidth});
  }
  for (; i + kWidth <= size; i += kWidth) sums[0] += term(i, int64_t{kWidth});
  if (i < size) sums[1] += term(i, size - i);
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls run(element) with a value of the C++ type that `type` names.
template <class Run>
PYPAR_INLINE void by_element_type(int type, const Run& run) {
  switch (type) {
    case kBFloat16:
      run(BFloat16{});
      break;
    case kFloat16:
      run(Float16{});
      break;
    default:
      run(float{});
      break;
  }
}

// run(element, row) for every row of an operator's arguments, which say how many there are, of what size and
// element type.
template <class Arguments, class Run>
PYPAR_INLINE void for_rows(const Arguments& a, const Run& run) {
  by_element_type(a.element_type, [&](auto element) {
    parallel_for(a.rows, rows_per_chunk(a.size), a.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) run(element, row);
    });
  });
}

}  // namespace pypar::PYPAR_ISA
