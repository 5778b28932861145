// The row work of linear_cross_entropy, on a block of logits that a product has just written: what the rows'
// softmax needs to know, and the gradient of the logits in their place. Contract and definition in
// pypar/ops/linear_cross_entropy.
#include "core/registry.h"

namespace pypar {

struct LinearCrossEntropyStatistics {
  float* logits;           // [rows, size] of products; bias and softcap are applied in place
  const float* bias;       // [size] or null
  const int64_t* targets;  // [rows], counted from the block's first word; elsewhere: not in this block
  float* maximum;          // [rows]: each row's greatest logit so far
  float* total;            // [rows]: the sum of exp(logit - maximum) so far
  float* target_logit;     // [rows]: written where the target is in this block
  float* sum;              // [rows]: the sum of the logits so far, or null
  int64_t rows, size;
  float softcap;  // 0: none
  int num_threads;
};

struct LinearCrossEntropyGradient {
  float* logits;              // [rows, size], replaced by the gradient of what the product gave
  const float* bias;          // [size] or null: where neither bias nor softcap has been applied yet
  const int64_t* targets;     // [rows], as above
  const float* maximum;       // [rows], of all words
  const float* share;         // [rows]: factor of exp(logit - maximum)
  const float* target_share;  // [rows]: added at the target
  const float* each;          // [rows]: added to every word, or null
  int64_t rows, size;
  float softcap;  // 0: none
  bool is_raw;    // bias and softcap are still to be applied
  int num_threads;
};

PYPAR_KERNEL(linear_cross_entropy_statistics, LinearCrossEntropyStatistics)
PYPAR_KERNEL(linear_cross_entropy_gradient, LinearCrossEntropyGradient)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/activations.h"
#  include "core/exponentials.h"

namespace pypar::PYPAR_ISA {

PYPAR_INLINE Float capped(Float x, float softcap) { return tanh(x * (1.0f / softcap)) * softcap; }

PYPAR_INLINE Float with_bias(const float* x, const float* bias, int64_t i, int64_t count) {
  const Float product = load_first(x + i, count);
  return bias == nullptr ? product : product + load_first(bias + i, count);
}

static void finish_logits(float* x, const float* bias, int64_t size, float softcap) {
  for_vectors(size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Float value = with_bias(x, bias, i, count);
    store_first(x + i, softcap == 0.0f ? value : capped(value, softcap), count);
  });
}

static void statistics_row(const LinearCrossEntropyStatistics& a, int64_t row) {
  float* logits = a.logits + row * a.size;
  if (a.bias != nullptr || a.softcap != 0.0f) finish_logits(logits, a.bias, a.size, a.softcap);
  float here;
  const float block_total = sum_of_exponentials(logits, a.size, &here);
  // A total of 0 is a row of which all words are -inf so far: its maximum has no say.
  const float before = a.total[row];
  if (before == 0.0f) {
    a.maximum[row] = here;
    a.total[row] = block_total;
  } else if (block_total != 0.0f) {
    const float greatest = here > a.maximum[row] ? here : a.maximum[row];
    a.total[row] = before * exp_of(a.maximum[row] - greatest) + block_total * exp_of(here - greatest);
    a.maximum[row] = greatest;
  }
  const int64_t target = a.targets[row];
  if (target >= 0 && target < a.size) a.target_logit[row] = logits[target];
  if (a.sum != nullptr) {
    a.sum[row] += sum_over(
        a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA { return load_first(logits + i, count); });
  }
}

// The target's own place is computed again from its logit, in the order (p - 1): nothing is rounded between.
template <bool kIsPlain>
static void gradient_row(const LinearCrossEntropyGradient& a, int64_t row) {
  float* logits = a.logits + row * a.size;
  const float maximum = a.maximum[row], share = a.share[row];
  const float each = a.each == nullptr ? 0.0f : a.each[row];
  const int64_t target = a.targets[row];
  const bool is_here = target >= 0 && target < a.size;
  const float at_target = a.target_share[row];
  const Int lanes = lane_indices();
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    Float value = kIsPlain || !a.is_raw ? load_first(logits + i, count) : with_bias(logits, a.bias, i, count);
    if (!kIsPlain && a.is_raw && a.softcap != 0.0f) value = capped(value, a.softcap);
    Float gradient = exp(value - maximum) * share + each;
    if (is_here && target >= i && target < i + count) {
      gradient += select(lanes == static_cast<int32_t>(target - i), broadcast(at_target), zero());
    }
    if (!kIsPlain && a.softcap != 0.0f) {
      const Float slope = value * (1.0f / a.softcap);
      gradient *= 1.0f - slope * slope;
    }
    store_first(logits + i, gradient, count);
  });
}

void linear_cross_entropy_statistics(const LinearCrossEntropyStatistics& a) {
  parallel_for(a.rows, rows_per_chunk(a.size), a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) statistics_row(a, row);
  });
}

void linear_cross_entropy_gradient(const LinearCrossEntropyGradient& a) {
  const bool is_plain = a.softcap == 0.0f && !(a.is_raw && a.bias != nullptr);
  parallel_for(a.rows, rows_per_chunk(a.size), a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      is_plain ? gradient_row<true>(a, row) : gradient_row<false>(a, row);
    }
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(linear_cross_entropy) {
  module.def(
      "linear_cross_entropy_statistics",
      [](uintptr_t logits, uintptr_t bias, uintptr_t targets, uintptr_t maximum, uintptr_t total,
         uintptr_t target_logit, uintptr_t sum, int64_t rows, int64_t size, float softcap, int num_threads) {
        pypar::launch<pypar::linear_cross_entropy_statistics_kernels>(pypar::LinearCrossEntropyStatistics{
            reinterpret_cast<float*>(logits), reinterpret_cast<const float*>(bias),
            reinterpret_cast<const int64_t*>(targets), reinterpret_cast<float*>(maximum),
            reinterpret_cast<float*>(total), reinterpret_cast<float*>(target_logit),
            reinterpret_cast<float*>(sum), rows, size, softcap, num_threads});
      });
  module.def("linear_cross_entropy_gradient",
             [](uintptr_t logits, uintptr_t bias, uintptr_t targets, uintptr_t maximum, uintptr_t share,
                uintptr_t target_share, uintptr_t each, int64_t rows, int64_t size, float softcap,
                bool is_raw, int num_threads) {
               pypar::launch<pypar::linear_cross_entropy_gradient_kernels>(pypar::LinearCrossEntropyGradient{
                   reinterpret_cast<float*>(logits), reinterpret_cast<const float*>(bias),
                   reinterpret_cast<const int64_t*>(targets), reinterpret_cast<const float*>(maximum),
                   reinterpret_cast<const float*>(share), reinterpret_cast<const float*>(target_share),
                   reinterpret_cast<const float*>(each), rows, size, softcap, is_raw, num_threads});
             });
}

#endif
