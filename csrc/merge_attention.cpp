// Attention over parts of the keys, merged: contract and definition in pypar/ops/merge_attention.py. A row is
// (batch, position, head); lse and its gradients are [batch, head, position].
#include "core/registry.h"

namespace pypar {

struct MergeAttention {
  const void* outs;   // [parts, rows, size], one after the other
  const float* lses;  // [parts, lse_rows], fp32
  void* out;          // [rows, size]
  float* lse;         // [lse_rows]
  int64_t parts, batch, positions, heads, size;
  int element_type, num_threads;
};

struct MergeAttentionBackward {
  const void* dout;   // [rows, size]
  const float* dlse;  // [lse_rows] or null
  const void* outs;   // as above
  const float* lses;  // as above
  const float* lse;   // [lse_rows]
  void* douts;        // [parts, rows, size]
  float* dlses;       // [parts, lse_rows]
  int64_t parts, batch, positions, heads, size;
  int element_type, num_threads;
};

PYPAR_KERNEL(merge_attention_forward, MergeAttention)
PYPAR_KERNEL(merge_attention_backward, MergeAttentionBackward)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/rows.h"

namespace pypar::PYPAR_ISA {

constexpr float kNothing = -__builtin_inff();

// Where a row's lse is.
template <class Arguments>
PYPAR_INLINE int64_t lse_place(const Arguments& a, int64_t row) {
  const int64_t head = row % a.heads, position = row / a.heads % a.positions,
                batch = row / a.heads / a.positions;
  return (batch * a.heads + head) * a.positions + position;
}

template <class Arguments, class Body>
PYPAR_INLINE void for_merged_rows(const Arguments& a, const Body& body) {
  const int64_t rows = a.batch * a.positions * a.heads;
  by_element_type(a.element_type, [&](auto element) {
    parallel_for(rows, rows_per_chunk(a.size * a.parts), a.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(element, row, lse_place(a, row), rows);
    });
  });
}

// A part's share of a row that sees something: 0 of one that saw nothing, whose out is not read.
PYPAR_INLINE float share_of(float lse, float merged) {
  return lse == kNothing ? 0.0f : static_cast<float>(__builtin_exp(static_cast<double>(lse) - merged));
}

template <class Element>
static void forward_row(const MergeAttention& a, int64_t row, int64_t place, int64_t rows) {
  float most = kNothing;
  for (int64_t p = 0; p < a.parts; ++p) {
    const float lse = a.lses[p * rows + place];
    most = lse > most || lse != lse ? lse : most;
  }
  Element* out = static_cast<Element*>(a.out) + row * a.size;
  double total = 0.0;
  for (int64_t p = 0; p < a.parts && most != kNothing; ++p) {
    total += __builtin_exp(static_cast<double>(a.lses[p * rows + place]) - most);
  }
  const double merged = most == kNothing ? kNothing : most + __builtin_log(total);
  a.lse[place] = static_cast<float>(merged);
  const auto* outs = static_cast<const Element*>(a.outs) + row * a.size;
  auto* const shares = static_cast<float*>(thread_scratch(static_cast<size_t>(a.parts) * sizeof(float)));
  for (int64_t p = 0; p < a.parts; ++p) {
    const float part = a.lses[p * rows + place];
    shares[p] = part == kNothing ? 0.0f : static_cast<float>(__builtin_exp(part - merged));
  }
  for_vectors(a.size, [&](int64_t i, int64_t n) PYPAR_INLINE_LAMBDA {
    Float sum = zero();
    for (int64_t p = 0; p < a.parts; ++p) {
      if (shares[p] != 0.0f) sum += load_first(outs + p * rows * a.size + i, n) * shares[p];
    }
    store_first(out + i, sum, n);
  });
}

template <class Element>
static void backward_row(const MergeAttentionBackward& a, int64_t row, int64_t place, int64_t rows) {
  const Element* dout = static_cast<const Element*>(a.dout) + row * a.size;
  const float merged = a.lse[place], dlse = a.dlse == nullptr ? 0.0f : a.dlse[place];
  float mean = 0.0f;  // of the parts' products with dout: dout . out, without what rounding took off out
  for (int64_t p = 0; p < a.parts; ++p) {
    const int64_t at = p * rows + place;
    const float share = share_of(a.lses[at], merged);
    const Element* out = static_cast<const Element*>(a.outs) + (p * rows + row) * a.size;
    Element* d = static_cast<Element*>(a.douts) + (p * rows + row) * a.size;
    a.dlses[at] = 0.0f;
    if (share == 0.0f) {
      for_vectors(a.size, [&](int64_t i, int64_t n) PYPAR_INLINE_LAMBDA { store_first(d + i, zero(), n); });
      continue;
    }
    const float product = sum_over(a.size, [&](int64_t i, int64_t n) PYPAR_INLINE_LAMBDA {
      const Float value = load_first(dout + i, n);
      const Float term = value * load_first(out + i, n);
      store_first(d + i, value * share, n);
      return term;
    });
    a.dlses[at] = product;
    mean += share * product;
  }
  for (int64_t p = 0; p < a.parts; ++p) {
    const int64_t at = p * rows + place;
    const float share = share_of(a.lses[at], merged);
    a.dlses[at] = share == 0.0f ? 0.0f : share * (dlse + (a.dlses[at] - mean));
  }
}

void merge_attention_forward(const MergeAttention& a) {
  for_merged_rows(a, [&](auto element, int64_t row, int64_t place, int64_t rows) {
    forward_row<decltype(element)>(a, row, place, rows);
  });
}

void merge_attention_backward(const MergeAttentionBackward& a) {
  for_merged_rows(a, [&](auto element, int64_t row, int64_t place, int64_t rows) {
    backward_row<decltype(element)>(a, row, place, rows);
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(merge_attention) {
  module.def("merge_attention_forward",
             [](uintptr_t outs, uintptr_t lses, uintptr_t out, uintptr_t lse, int64_t parts, int64_t batch,
                int64_t positions, int64_t heads, int64_t size, int element_type, int num_threads) {
               pypar::launch<pypar::merge_attention_forward_kernels>(pypar::MergeAttention{
                   reinterpret_cast<const void*>(outs), reinterpret_cast<const float*>(lses),
                   reinterpret_cast<void*>(out), reinterpret_cast<float*>(lse), parts, batch, positions,
                   heads, size, element_type, num_threads});
             });
  module.def("merge_attention_backward", [](uintptr_t dout, uintptr_t dlse, uintptr_t outs, uintptr_t lses,
                                            uintptr_t lse, uintptr_t douts, uintptr_t dlses, int64_t parts,
                                            int64_t batch, int64_t positions, int64_t heads, int64_t size,
                                            int element_type, int num_threads) {
    pypar::launch<pypar::merge_attention_backward_kernels>(pypar::MergeAttentionBackward{
        reinterpret_cast<const void*>(dout), reinterpret_cast<const float*>(dlse),
        reinterpret_cast<const void*>(outs), reinterpret_cast<const float*>(lses),
        reinterpret_cast<const float*>(lse), reinterpret_cast<void*>(douts), reinterpret_cast<float*>(dlses),
        parts, batch, positions, heads, size, element_type, num_threads});
  });
}

#endif
