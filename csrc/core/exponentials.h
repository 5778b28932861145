// The sum along a row that a softmax needs, with its maximum found on the way.
#pragma once

#include "core/rows.h"

namespace pypar::PYPAR_ISA {

// Elements whose maximum is taken before their exponentials: they stay in the first-level cache in between,
// so that memory is read once.
constexpr int64_t kBlock = 2048;

PYPAR_INLINE float exp_of(float x) { return exp(broadcast(x))[0]; }

template <class Element>
static float greatest_of(const Element* x, int64_t size) {
  Float greatest = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) greatest = max(load(x + i), greatest);
  if (i < size) {
    const Float tail = load_partial(x + i, size - i);
    const Int inside = lane_indices() < static_cast<int32_t>(size - i);
    greatest = max(select(inside, tail, greatest), greatest);
  }
  return reduce_max(greatest);
}

// The sum of exp(x - *maximum), which each block scales by the maximum so far (Milakov and Gimelshein,
// arXiv 1805.02867).
template <class Element>
static float sum_of_exponentials(const Element* x, int64_t size, float* maximum) {
  const float infinity = __builtin_inff();
  float greatest = -infinity, shift = 0.0f, sum = 0.0f;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const Element* block = x + begin;
    const int64_t block_size = smaller(kBlock, size - begin);
    const float here = greatest_of(block, block_size);
    const float before = shift;
    greatest = here > greatest ? here : greatest;
    // Nothing but -inf or NaN so far: zero keeps what follows from -inf - -inf, and lets NaN through.
    shift = greatest == -infinity ? 0.0f : greatest;
    const float block_sum = sum_over(block_size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      const Float term = exp(load_first(block + i, count) - shift);
      return count == kWidth ? term : select(lane_indices() < static_cast<int32_t>(count), term, zero());
    });
    sum = (sum == 0.0f ? 0.0f : sum * exp_of(before - shift)) + block_sum;
  }
  *maximum = shift;
  return sum;
}

}  // namespace pypar::PYPAR_ISA
