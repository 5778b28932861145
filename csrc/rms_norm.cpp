// Root mean square normalisation: contract and definition in pypar/ops/rms_norm.py.
#include "core/registry.h"

namespace pypar {

struct RmsNormForward {
  const void* x;        // [rows, size], rows x_stride apart
  const float* weight;  // [size]
  void* out;            // [rows, size]
  float* rstd;          // [rows]
  int64_t rows, size, x_stride;
  float eps;
  int element_type, num_threads;
};

struct RmsNormBackward {
  const void* dout;     // [rows, size], rows dout_stride apart
  const void* x;        // [rows, size], rows x_stride apart
  const float* weight;  // [size]
  const float* rstd;    // [rows]
  void* dx;             // [rows, size]
  float* dweight;       // [size]
  float* partial;       // [ceil(rows / rows_per_block), size]: what each block of rows adds to dweight
  int64_t rows, size, dout_stride, x_stride, rows_per_block;
  int element_type, num_threads;
};

PYPAR_KERNEL(rms_norm_forward, RmsNormForward)
PYPAR_KERNEL(rms_norm_backward, RmsNormBackward)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/rows.h"

namespace pypar::PYPAR_ISA {

template <class Element>
static void forward_row(const RmsNormForward& a, int64_t row) {
  const Element* x = static_cast<const Element*>(a.x) + row * a.x_stride;
  Element* out = static_cast<Element*>(a.out) + row * a.size;
  const float sum = sum_over(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Float v = load_first(x + i, count);
    return v * v;
  });
  const float rstd = 1.0f / __builtin_sqrtf(sum / static_cast<float>(a.size) + a.eps);
  a.rstd[row] = rstd;
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    store_first(out + i, load_first(x + i, count) * rstd * load_first(a.weight + i, count), count);
  });
}

// Writes a row of dx and adds the row's share of dweight to `sums`.
template <class Element>
static void backward_row(const RmsNormBackward& a, int64_t row, float* sums) {
  const Element* dout = static_cast<const Element*>(a.dout) + row * a.dout_stride;
  const Element* x = static_cast<const Element*>(a.x) + row * a.x_stride;
  Element* dx = static_cast<Element*>(a.dx) + row * a.size;
  const float* weight = a.weight;
  const float rstd = a.rstd[row];
  const float sum = sum_over(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    return load_first(dout + i, count) * load_first(weight + i, count) * load_first(x + i, count);
  });
  const float mean = sum * rstd / static_cast<float>(a.size);
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    const Float d = load_first(dout + i, count);
    const Float normed = load_first(x + i, count) * rstd;
    store_first(dx + i, (d * load_first(weight + i, count) - normed * mean) * rstd, count);
    store_first(sums + i, load_first(sums + i, count) + d * normed, count);
  });
}

void rms_norm_forward(const RmsNormForward& a) {
  by_element_type(a.element_type, [&](auto element) {
    parallel_for(a.rows, rows_per_chunk(a.size), a.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward_row<decltype(element)>(a, row);
    });
  });
}

void rms_norm_backward(const RmsNormBackward& a) {
  const int64_t num_blocks = (a.rows + a.rows_per_block - 1) / a.rows_per_block;
  by_element_type(a.element_type, [&](auto element) {
    parallel_for(num_blocks, 1, a.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        float* sums = a.partial + block * a.size;
        std::memset(sums, 0, sizeof(float) * a.size);
        const int64_t last = smaller(a.rows, (block + 1) * a.rows_per_block);
        for (int64_t row = block * a.rows_per_block; row < last; ++row) {
          backward_row<decltype(element)>(a, row, sums);
        }
      }
    });
  });
  // Blocks are added in an order given by their number, whichever thread made them, and in several chains,
  // since the error grows with the length of a chain.
  for_vectors(a.size, [&](int64_t i, int64_t count) PYPAR_INLINE_LAMBDA {
    constexpr int kChains = 16;
    Float sums[kChains] = {};
    for (int64_t block = 0; block < num_blocks; ++block) {
      sums[block % kChains] += load_first(a.partial + block * a.size + i, count);
    }
    for (int half = kChains / 2; half > 0; half /= 2) {
      for (int chain = 0; chain < half; ++chain) sums[chain] += sums[chain + half];
    }
    store_first(a.dweight + i, sums[0], count);
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(rms_norm) {
  module.def(
      "rms_norm_forward", [](uintptr_t x, uintptr_t weight, uintptr_t out, uintptr_t rstd, int64_t rows,
                             int64_t size, int64_t x_stride, float eps, int element_type, int num_threads) {
        pypar::launch<pypar::rms_norm_forward_kernels>(
            pypar::RmsNormForward{reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(weight),
                                  reinterpret_cast<void*>(out), reinterpret_cast<float*>(rstd), rows, size,
                                  x_stride, eps, element_type, num_threads});
      });
  module.def("rms_norm_backward", [](uintptr_t dout, uintptr_t x, uintptr_t weight, uintptr_t rstd,
                                     uintptr_t dx, uintptr_t dweight, uintptr_t partial, int64_t rows,
                                     int64_t size, int64_t dout_stride, int64_t x_stride,
                                     int64_t rows_per_block, int element_type, int num_threads) {
    pypar::launch<pypar::rms_norm_backward_kernels>(pypar::RmsNormBackward{
        reinterpret_cast<const void*>(dout), reinterpret_cast<const void*>(x),
        reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(rstd),
        reinterpret_cast<void*>(dx), reinterpret_cast<float*>(dweight), reinterpret_cast<float*>(partial),
        rows, size, dout_stride, x_stride, rows_per_block, element_type, num_threads});
  });
}

#endif
