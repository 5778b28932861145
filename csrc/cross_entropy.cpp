// Cross-entropy of each token: contract and definition in pypar/ops/cross_entropy.py.
#include "core/registry.h"

namespace pypar {

struct CrossEntropyForward {
  const void* logits;      // [rows, size], rows `stride` apart
  const int64_t* targets;  // [rows]
  float* loss;             // [rows]
  float* maximum;          // [rows]: each row's greatest logit
  float* total;            // [rows]: the sum of exp(logit - maximum)
  int64_t* wrong_row;      // holds `rows`; set to the first row whose target is out of range
  int64_t rows, size, stride, ignore_index;
  int element_type, num_threads;
};

struct CrossEntropyBackward {
  const float* dloss;      // [rows]
  const void* logits;      // [rows, size], rows `stride` apart
  const int64_t* targets;  // [rows], those that forward took
  const float* maximum;    // [rows], of forward
  const float* total;      // [rows]
  void* dlogits;           // [rows, size]
  int64_t rows, size, stride, ignore_index;
  int element_type, num_threads;
};

PYPAR_KERNEL(cross_entropy_forward, CrossEntropyForward)
PYPAR_KERNEL(cross_entropy_backward, CrossEntropyBackward)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/exponentials.h"

namespace pypar::PYPAR_ISA {

PYPAR_INLINE void lower_to(int64_t* first, int64_t row) {
  int64_t seen = __atomic_load_n(first, __ATOMIC_RELAXED);
  while (row < seen &&
         !__atomic_compare_exchange_n(first, &seen, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <class Element>
static void forward_row(const CrossEntropyForward& a, int64_t row) {
  const Element* logits = static_cast<const Element*>(a.logits) + row * a.stride;
  const int64_t target = a.targets[row];
  a.loss[row] = a.maximum[row] = 0.0f;
  a.total[row] = 1.0f;
  if (target == a.ignore_index) return;
  if (target < 0 || target >= a.size) {
    lower_to(a.wrong_row, row);
    return;
  }
  a.total[row] = sum_of_exponentials(logits, a.size, a.maximum + row);
  // The maximum is taken from the logit and not added to the logarithm: the other way round, a large one
  // would swallow the digits of a small loss.
  a.loss[row] = __builtin_logf(a.total[row]) - (to_float(logits[target]) - a.maximum[row]);
}

template <class Element>
static void backward_row(const CrossEntropyBackward& a, int64_t row) {
  const Element* logits = static_cast<const Element*>(a.logits) + row * a.stride;
  Element* dlogits = static_cast<Element*>(a.dlogits) + row * a.size;
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) {
    std::memset(dlogits, 0, sizeof(Element) * a.size);
    return;
  }
  const float dloss = a.dloss[row], maximum = a.maximum[row], scale = 1.0f / a.total[row];
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    store_first(dlogits + i, exp(load_first(logits + i, count) - maximum) * scale * dloss, count);
  });
  from_float((exp_of(to_float(logits[target]) - maximum) * scale - 1.0f) * dloss, dlogits + target);
}

void cross_entropy_forward(const CrossEntropyForward& a) {
  for_rows(a, [&](auto element, int64_t row) { forward_row<decltype(element)>(a, row); });
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  for_rows(a, [&](auto element, int64_t row) { backward_row<decltype(element)>(a, row); });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(cross_entropy) {
  // Returns the first row whose target is out of range, or -1.
  module.def("cross_entropy_forward", [](uintptr_t logits, uintptr_t targets, uintptr_t loss,
                                         uintptr_t maximum, uintptr_t total, int64_t rows, int64_t size,
                                         int64_t stride, int64_t ignore_index, int element_type,
                                         int num_threads) {
    int64_t wrong_row = rows;
    pypar::launch<pypar::cross_entropy_forward_kernels>(pypar::CrossEntropyForward{
        reinterpret_cast<const void*>(logits), reinterpret_cast<const int64_t*>(targets),
        reinterpret_cast<float*>(loss), reinterpret_cast<float*>(maximum), reinterpret_cast<float*>(total),
        &wrong_row, rows, size, stride, ignore_index, element_type, num_threads});
    return wrong_row < rows ? wrong_row : -1;
  });
  module.def("cross_entropy_backward",
             [](uintptr_t dloss, uintptr_t logits, uintptr_t targets, uintptr_t maximum, uintptr_t total,
                uintptr_t dlogits, int64_t rows, int64_t size, int64_t stride, int64_t ignore_index,
                int element_type, int num_threads) {
               pypar::launch<pypar::cross_entropy_backward_kernels>(pypar::CrossEntropyBackward{
                   reinterpret_cast<const float*>(dloss), reinterpret_cast<const void*>(logits),
                   reinterpret_cast<const int64_t*>(targets), reinterpret_cast<const float*>(maximum),
                   reinterpret_cast<const float*>(total), reinterpret_cast<void*>(dlogits), rows, size,
                   stride, ignore_index, element_type, num_threads});
             });
}

#endif
