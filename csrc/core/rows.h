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

// The same of pairs of neighbours, of which there are `count`.
template <class Element>
PYPAR_INLINE Pair load_first_pairs(const Element* p, int64_t count) {
  return count == kWidth ? load_pairs(p) : load_partial_pairs(p, count);
}

template <class Element>
PYPAR_INLINE void store_first_pairs(Element* p, Pair x, int64_t count) {
  if (count == kWidth) {
    store_pairs(p, x);
  } else {
    store_partial_pairs(p, x, count);
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

// The sums of both parts of term(i, count), a pair of Float, as `sum_over` has one.
struct FloatPair {
  Float first, second;
};
struct FloatSums {
  float first, second;
};
template <class Term>
PYPAR_INLINE FloatSums sums_over(int64_t size, const Term& term) {
  FloatPair sums[2] = {};
  const auto add = [&](int part, int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const FloatPair found = term(i, count);
    sums[part].first += found.first;
    sums[part].second += found.second;
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
    add(0, i, kWidth);
    add(1, i + kWidth, kWidth);
  }
  if (i + kWidth <= size) {
    add(0, i, kWidth);
    i += kWidth;
  }
  if (i < size) add(1, i, size - i);
  return {reduce_sum(sums[0].first + sums[1].first), reduce_sum(sums[0].second + sums[1].second)};
}

// The first `count` lanes of x; the others are zero.
PYPAR_INLINE Float first_lanes(Float x, int64_t count) {
  return count == kWidth ? x : select(lane_indices() < static_cast<int32_t>(count), x, zero());
}

// out[i] = the sum over r of parts[r * stride + i], for i in [0, size) and r in [0, rows), in an order given
// by r alone. In several chains, since the error grows with the length of a chain.
PYPAR_INLINE void sum_rows(const float* parts, int64_t rows, int64_t size, int64_t stride, float* out) {
  for_vectors(size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    constexpr int kChains = 16;
    Float sums[kChains] = {};
    for (int64_t row = 0; row < rows; ++row) {
      sums[row % kChains] += load_first(parts + row * stride + i, count);
    }
    for (int half = kChains / 2; half > 0; half /= 2) {
      for (int chain = 0; chain < half; ++chain) sums[chain] += sums[chain + half];
    }
    store_first(out + i, sums[0], count);
  });
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
