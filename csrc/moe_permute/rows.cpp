// Tokens to their rows, in the order of experts, and rows back to their tokens. Contract and definition in
// pypar/ops/moe_permute. Every choice of every token has one row; ~row says that it has no expert: its row is
// zero, and nothing of it comes back.
#include "core/registry.h"

namespace pypar {

struct MoeScatter {
  const void* x;          // [tokens, size], rows x_stride apart
  const int64_t* places;  // [tokens, k]
  const float* weights;   // [tokens, k] or null: ones
  const void* rows;       // [tokens * k, size], or null: its products with x are not wanted
  void* out;              // [tokens * k, size]: each token, times its weight, at its choices' rows
  float* products;        // [tokens, k] or null: of each token and each of its rows
  int64_t tokens, size, k, x_stride, rows_stride;
  int element_type, num_threads;
};

struct MoeGather {
  const void* rows;       // [tokens * k, size], rows rows_stride apart
  const int64_t* places;  // [tokens, k]
  const float* weights;   // [tokens, k] or null: ones
  void* out;              // [tokens, size]: the sum of each token's rows, times their weights, in their order
  int64_t tokens, size, k, rows_stride;
  int element_type, num_threads;
};

PYPAR_KERNEL(moe_permute_scatter, MoeScatter)
PYPAR_KERNEL(moe_permute_gather, MoeGather)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/streaming_stores.h"

namespace pypar::PYPAR_ISA {

template <class Element>
static Element* row_of(void* rows, int64_t row, int64_t stride) {
  return static_cast<Element*>(rows) + row * stride;
}
template <class Element>
static const Element* row_of(const void* rows, int64_t row, int64_t stride) {
  return static_cast<const Element*>(rows) + row * stride;
}

// Copies of one token: each of its cache lines is read once, and written to all its rows.
template <class Element>
static void copy_token(const MoeScatter& a, int64_t token, bool streams) {
  const int64_t bytes = a.size * static_cast<int64_t>(sizeof(Element));
  const auto* from = reinterpret_cast<const char*>(row_of<Element>(a.x, token, a.x_stride));
  const int64_t* places = a.places + token * a.k;
  constexpr int64_t kMost = 8;  // rows written side by side
  for (int64_t first = 0; first < a.k; first += kMost) {
    char* to[kMost];
    int64_t count = 0;
    for (int64_t j = first; j < smaller(a.k, first + kMost); ++j) {
      if (places[j] >= 0) {
        to[count++] = reinterpret_cast<char*>(row_of<Element>(a.out, places[j], a.size));
        continue;
      }
      auto* zeros = reinterpret_cast<char*>(row_of<Element>(a.out, ~places[j], a.size));
      std::memset(zeros, 0, static_cast<size_t>(bytes));
    }
    if (streams) {
      for (int64_t at = 0; at < bytes; at += kLine) {
        for (int64_t i = 0; i < count; ++i) stream_line(to[i] + at, from + at);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) std::memcpy(to[i], from, static_cast<size_t>(bytes));
    }
  }
}

// out = x * weight, and returns the product of x and row where there is one.
template <bool kStreams, class Element>
static float scale_row(const Element* x, float weight, const Element* row, Element* out, int64_t size) {
  const auto scaled = [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Float value = load_first(x + i, count);
    put_first<kStreams>(out + i, value * weight, count);
    return value;
  };
  if (row == nullptr) {
    for_vectors(size, scaled);
    return 0.0f;
  }
  return sum_over(size, [&](int64_t i, int64_t count)
                            PYPAR_INLINE_LAMBDA { return scaled(i, count) * load_first(row + i, count); });
}

template <class Element>
static void scale_token(const MoeScatter& a, int64_t token, bool streams) {
  const Element* x = row_of<Element>(a.x, token, a.x_stride);
  for (int64_t j = 0; j < a.k; ++j) {
    const int64_t choice = token * a.k + j, place = a.places[choice];
    const int64_t at = place < 0 ? ~place : place;
    Element* out = row_of<Element>(a.out, at, a.size);
    float product = 0.0f;
    if (place < 0) {
      std::memset(out, 0, static_cast<size_t>(a.size) * sizeof(Element));
    } else {
      const Element* row = a.rows == nullptr ? nullptr : row_of<Element>(a.rows, at, a.rows_stride);
      const float weight = a.weights == nullptr ? 1.0f : a.weights[choice];
      product = (streams ? scale_row<true, Element> : scale_row<false, Element>)(x, weight, row, out, a.size);
    }
    if (a.products != nullptr) a.products[choice] = product;
  }
}

template <class Element>
static void gather_token(const MoeGather& a, int64_t token) {
  Element* out = row_of<Element>(a.out, token, a.size);
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    Float sum = zero();
    for (int64_t j = 0; j < a.k; ++j) {
      const int64_t place = a.places[token * a.k + j];
      if (place < 0) continue;
      const Float value = load_first(row_of<Element>(a.rows, place, a.rows_stride) + i, count);
      sum += a.weights == nullptr ? value : value * a.weights[token * a.k + j];
    }
    store_first(out + i, sum, count);
  });
}

void moe_permute_scatter(const MoeScatter& a) {
  by_element_type(a.element_type, [&](auto element) {
    using Element = decltype(element);
    const bool is_streamed_by_vectors =
        is_streamed(static_cast<const Element*>(a.out), a.tokens * a.k, a.size);
    const bool is_streamed_by_lines =
        is_streamed_by_vectors && a.size * static_cast<int64_t>(sizeof(Element)) % kLine == 0;
    const bool copies = a.weights == nullptr && a.products == nullptr;
    parallel_for(a.tokens, rows_per_chunk(a.size * a.k), a.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        copies ? copy_token<Element>(a, token, is_streamed_by_lines)
               : scale_token<Element>(a, token, is_streamed_by_vectors);
      }
      finish_streams();
    });
  });
}

void moe_permute_gather(const MoeGather& a) {
  by_element_type(a.element_type, [&](auto element) {
    parallel_for(a.tokens, rows_per_chunk(a.size * a.k), a.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) gather_token<decltype(element)>(a, token);
    });
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(moe_permute_rows) {
  module.def(
      "moe_permute_scatter", [](uintptr_t x, uintptr_t places, uintptr_t weights, uintptr_t rows,
                                uintptr_t out, uintptr_t products, int64_t tokens, int64_t size, int64_t k,
                                int64_t x_stride, int64_t rows_stride, int element_type, int num_threads) {
        pypar::launch<pypar::moe_permute_scatter_kernels>(
            pypar::MoeScatter{reinterpret_cast<const void*>(x), reinterpret_cast<const int64_t*>(places),
                              reinterpret_cast<const float*>(weights), reinterpret_cast<const void*>(rows),
                              reinterpret_cast<void*>(out), reinterpret_cast<float*>(products), tokens, size,
                              k, x_stride, rows_stride, element_type, num_threads});
      });
  module.def("moe_permute_gather",
             [](uintptr_t rows, uintptr_t places, uintptr_t weights, uintptr_t out, int64_t tokens,
                int64_t size, int64_t k, int64_t rows_stride, int element_type, int num_threads) {
               pypar::launch<pypar::moe_permute_gather_kernels>(pypar::MoeGather{
                   reinterpret_cast<const void*>(rows), reinterpret_cast<const int64_t*>(places),
                   reinterpret_cast<const float*>(weights), reinterpret_cast<void*>(out), tokens, size, k,
                   rows_stride, element_type, num_threads});
             });
}

#endif
