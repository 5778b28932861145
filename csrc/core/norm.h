// What rms_norm and layer_norm share; kCenter is layer_norm's: rows lose their mean, and there is a bias.
// Definition in pypar/ops/norm/definition.py.
//
// A row is read from memory once and then again from the nearest cache.
#pragma once

#include "core/registry.h"

namespace pypar {

struct NormForward {
  const void* x;         // [rows, size], rows x_stride apart
  const void* residual;  // [rows, size], rows residual_stride apart, or null
  const float* scale;    // [size]: weight + weight_offset, or ones
  const float* shift;    // [size]: bias, or zeros; null without kCenter
  void* out;             // [rows, size]
  void* sum;             // [rows, size]: x + residual, or null
  float* mean;           // [rows], or null without kCenter
  float* rstd;           // [rows]
  int64_t rows, size, x_stride, residual_stride;
  float eps;
  int element_type, num_threads;
};

struct NormBackward {
  const void* dout;    // [rows, size], rows dout_stride apart
  const void* dsum;    // [rows, size], rows dsum_stride apart, or null
  const void* x;       // [rows, size], rows x_stride apart: what was normalised
  const float* scale;  // [size]
  const float* mean;   // [rows], or null without kCenter
  const float* rstd;   // [rows]
  void* dx;            // [rows, size]
  float* sums;         // [2, size]: dweight, dbias; null: they are not wanted
  float* partial;      // [ceil(rows / rows_per_block), 2, size]: what each block of rows adds to sums
  int64_t rows, size, dout_stride, dsum_stride, x_stride, rows_per_block;
  int element_type, num_threads;
};

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/streaming_stores.h"

namespace pypar::PYPAR_ISA {

template <bool kCenter, class Element>
PYPAR_INLINE Float centered(const Element* x, int64_t count, float mean) {
  return kCenter ? load_first(x, count) - mean : load_first(x, count);
}

constexpr int64_t kLargestStreamedSum = 8192;  // elements of a row that waits in the nearest cache

// read(i, count) gives what is to be normalised; it is called once for each vector, and `x` has it then.
template <bool kCenter, bool kResidual, bool kStreams, class Element, class Read>
PYPAR_INLINE void norm_forward_row(const NormForward& a, int64_t row, const Element* x, const Read& read) {
  Element* out = static_cast<Element*>(a.out) + row * a.size;
  Element* sum = static_cast<Element*>(a.sum) + row * a.size;
  const float size = static_cast<float>(a.size);
  float mean = 0.0f, squares;
  if (kCenter) {
    mean = sum_over(a.size, read) / size;
    // What is left has a mean too, by which rounding took too little or too much.
    const FloatSums left = sums_over(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      const Float v = first_lanes(load_first(x + i, count) - mean, count);
      return FloatPair{v, v * v};
    });
    mean += left.first / size;
    squares = left.second - left.first * (left.first / size);
    a.mean[row] = mean;
  } else {
    squares = sum_over(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      const Float v = read(i, count);
      return v * v;
    });
  }
  const float rstd = 1.0f / __builtin_sqrtf(squares / size + a.eps);
  a.rstd[row] = rstd;
  // Memory would rest while the caches are read: the next row is fetched meanwhile.
  const Element* next = static_cast<const Element*>(a.x) + (row + 1) * a.x_stride;
  const Element* next_residual = static_cast<const Element*>(a.residual) + (row + 1) * a.residual_stride;
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    __builtin_prefetch(next + i);
    if (kResidual) __builtin_prefetch(next_residual + i);
    const Float v = centered<kCenter>(x + i, count, mean) * rstd * load_first(a.scale + i, count);
    put_first<kStreams>(out + i, kCenter ? v + load_first(a.shift + i, count) : v, count);
    if (kResidual && kStreams) stream(sum + i, load(x + i));
  });
}

template <class Element, bool kCenter, bool kStreams>
static void norm_forward_row(const NormForward& a, int64_t row) {
  const Element* x = static_cast<const Element*>(a.x) + row * a.x_stride;
  if (a.residual) {
    const Element* residual = static_cast<const Element*>(a.residual) + row * a.residual_stride;
    alignas(64) Element waiting[kStreams ? kLargestStreamedSum : 1];
    Element* sum = kStreams ? waiting : static_cast<Element*>(a.sum) + row * a.size;
    norm_forward_row<kCenter, true, kStreams>(a, row, sum, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      store_first(sum + i, load_first(x + i, count) + load_first(residual + i, count), count);
      return load_first(sum + i, count);  // as it was rounded
    });
  } else {
    norm_forward_row<kCenter, false, kStreams>(
        a, row, x, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA { return load_first(x + i, count); });
  }
}

// Writes a row of dx and, with kSums, adds the row's shares of dweight and dbias to `sums` [2, size].
template <class Element, bool kCenter, bool kSums>
static void norm_backward_row(const NormBackward& a, int64_t row, float* sums) {
  const Element* dout = static_cast<const Element*>(a.dout) + row * a.dout_stride;
  const Element* dsum = static_cast<const Element*>(a.dsum) + row * a.dsum_stride;
  const Element* x = static_cast<const Element*>(a.x) + row * a.x_stride;
  Element* dx = static_cast<Element*>(a.dx) + row * a.size;
  const float rstd = a.rstd[row], mean = kCenter ? a.mean[row] : 0.0f;
  const float size = static_cast<float>(a.size);
  const auto g = [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    return load_first(dout + i, count) * load_first(a.scale + i, count);
  };
  FloatSums found{};  // of g, where rows are centered, and of g (x - mean); g is zero beyond the row
  if (kCenter) {
    found = sums_over(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      const Float v = g(i, count);
      return FloatPair{v, v * (load_first(x + i, count) - mean)};
    });
  } else {
    found.second = sum_over(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      return g(i, count) * load_first(x + i, count);
    });
  }
  const float mean_g = found.first / size, mean_gy = found.second * rstd / size;
  const auto write = [&](auto more) PYPAR_INLINE_LAMBDA {
    for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
      __builtin_prefetch(dout + a.dout_stride + i);
      __builtin_prefetch(x + a.x_stride + i);
      const Float d = load_first(dout + i, count);
      const Float y = centered<kCenter>(x + i, count, mean) * rstd;
      Float v = d * load_first(a.scale + i, count) - y * mean_gy;
      if (kCenter) v -= mean_g;
      store_first(dx + i, more(v * rstd, i, count), count);
      if (kSums) {
        store_first(sums + i, load_first(sums + i, count) + d * y, count);
        if (kCenter) store_first(sums + a.size + i, load_first(sums + a.size + i, count) + d, count);
      }
    });
  };
  if (a.dsum) {
    write([&](Float v, int64_t i, int64_t count)
              PYPAR_INLINE_LAMBDA { return v + load_first(dsum + i, count); });
  } else {
    write([](Float v, int64_t, int64_t) PYPAR_INLINE_LAMBDA { return v; });
  }
}

template <class Element, bool kCenter, bool kStreams>
static void norm_forward_rows(const NormForward& a) {
  parallel_for(a.rows, rows_per_chunk(a.size), a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) norm_forward_row<Element, kCenter, kStreams>(a, row);
    if (kStreams) finish_streams();
  });
}

template <bool kCenter>
static void norm_forward(const NormForward& a) {
  by_element_type(a.element_type, [&](auto element) {
    using Element = decltype(element);
    const bool sum_fits = a.sum == nullptr || (a.size <= kLargestStreamedSum &&
                                               is_streamed(static_cast<Element*>(a.sum), a.rows, a.size));
    if (sum_fits && is_streamed(static_cast<Element*>(a.out), a.rows, a.size)) {
      norm_forward_rows<Element, kCenter, true>(a);
    } else {
      norm_forward_rows<Element, kCenter, false>(a);
    }
  });
}

template <class Element, bool kCenter, bool kSums>
static void norm_backward_blocks(const NormBackward& a, int64_t num_blocks) {
  parallel_for(num_blocks, 1, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* sums = a.partial + block * 2 * a.size;
      if (kSums) std::memset(sums, 0, sizeof(float) * 2 * a.size);
      const int64_t last = smaller(a.rows, (block + 1) * a.rows_per_block);
      for (int64_t row = block * a.rows_per_block; row < last; ++row) {
        norm_backward_row<Element, kCenter, kSums>(a, row, sums);
      }
    }
  });
}

template <bool kCenter>
static void norm_backward(const NormBackward& a) {
  const int64_t num_blocks = (a.rows + a.rows_per_block - 1) / a.rows_per_block;
  by_element_type(a.element_type, [&](auto element) {
    if (a.sums) {
      norm_backward_blocks<decltype(element), kCenter, true>(a, num_blocks);
    } else {
      norm_backward_blocks<decltype(element), kCenter, false>(a, num_blocks);
    }
  });
  if (a.sums) sum_rows(a.partial, num_blocks, (kCenter ? 2 : 1) * a.size, 2 * a.size, a.sums);
}

}  // namespace pypar::PYPAR_ISA

#else

namespace pypar {

// What the modules' functions <op>_forward and <op>_backward do; addresses are 0 for what is not there.
template <class Kernels>
void bind_norm_forward(pybind11::module_& module, const char* name) {
  module.def(name, [](uintptr_t x, uintptr_t residual, uintptr_t scale, uintptr_t shift, uintptr_t out,
                      uintptr_t sum, uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t size,
                      int64_t x_stride, int64_t residual_stride, float eps, int element_type,
                      int num_threads) {
    launch<Kernels>(NormForward{reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(residual),
                                reinterpret_cast<const float*>(scale), reinterpret_cast<const float*>(shift),
                                reinterpret_cast<void*>(out), reinterpret_cast<void*>(sum),
                                reinterpret_cast<float*>(mean), reinterpret_cast<float*>(rstd), rows, size,
                                x_stride, residual_stride, eps, element_type, num_threads});
  });
}

template <class Kernels>
void bind_norm_backward(pybind11::module_& module, const char* name) {
  module.def(name, [](uintptr_t dout, uintptr_t dsum, uintptr_t x, uintptr_t scale, uintptr_t mean,
                      uintptr_t rstd, uintptr_t dx, uintptr_t sums, uintptr_t partial, int64_t rows,
                      int64_t size, int64_t dout_stride, int64_t dsum_stride, int64_t x_stride,
                      int64_t rows_per_block, int element_type, int num_threads) {
    launch<Kernels>(NormBackward{reinterpret_cast<const void*>(dout), reinterpret_cast<const void*>(dsum),
                                 reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(scale),
                                 reinterpret_cast<const float*>(mean), reinterpret_cast<const float*>(rstd),
                                 reinterpret_cast<void*>(dx), reinterpret_cast<float*>(sums),
                                 reinterpret_cast<float*>(partial), rows, size, dout_stride, dsum_stride,
                                 x_stride, rows_per_block, element_type, num_threads});
  });
}

}  // namespace pypar

#endif
