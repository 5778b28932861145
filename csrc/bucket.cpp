// Scale and convert in one pass: contract and definition in pypar/ops/bucket.py.
#include "core/registry.h"

namespace pypar {

struct BucketForward {
  const void* src;  // [count]
  void* out;        // [count]
  int64_t count;
  float scale;
  int src_type, out_type, num_threads;
};

PYPAR_KERNEL(bucket_forward, BucketForward)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/streaming_stores.h"

namespace pypar::PYPAR_ISA {

template <class Source, class Target>
static void convert(const Source* src, Target* out, int64_t count, float scale) {
  const Float factor = broadcast(scale);
  for_vectors(count, [&](int64_t i, int64_t n)
                         PYPAR_INLINE_LAMBDA { store_first(out + i, load_first(src + i, n) * factor, n); });
}

void bucket_forward(const BucketForward& a) {
  const int64_t size = a.src_type == kFloat32 ? 4 : 2;
  if (a.src_type == a.out_type && a.scale == 1.0f && a.src != a.out && a.count * size >= kStreamBytes) {
    const auto* src = static_cast<const char*>(a.src);
    auto* out = static_cast<char*>(a.out);
    return parallel_for(a.count, kChunkElements, a.num_threads, [&](int64_t begin, int64_t end) {
      stream_copy(src + begin * size, out + begin * size, (end - begin) * size);
    });
  }
  by_element_type(a.src_type, [&](auto source) {
    by_element_type(a.out_type, [&](auto target) {
      const auto* src = static_cast<const decltype(source)*>(a.src);
      auto* out = static_cast<decltype(target)*>(a.out);
      parallel_for(a.count, kChunkElements, a.num_threads, [&](int64_t begin, int64_t end) {
        convert(src + begin, out + begin, end - begin, a.scale);
      });
    });
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(bucket) {
  module.def("bucket_forward", [](uintptr_t src, uintptr_t out, int64_t count, float scale, int src_type,
                                  int out_type, int num_threads) {
    pypar::launch<pypar::bucket_forward_kernels>(
        pypar::BucketForward{reinterpret_cast<const void*>(src), reinterpret_cast<void*>(out), count, scale,
                             src_type, out_type, num_threads});
  });
}

#endif
