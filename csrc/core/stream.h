// Copies past the caches: what is written is not read first, and nothing is thrown out of the caches for it.
#pragma once

#include <cstring>

#if defined(__SSE2__)
#  include <immintrin.h>
#endif

#include "core/rows.h"

namespace pypar::PYPAR_ISA {

constexpr int64_t kLine = 64;  // bytes of a cache line

// From here on what is copied does not stay in a core's own cache anyway.
constexpr int64_t kStreamBytes = 256 << 10;

// One cache line. `out` is aligned.
PYPAR_INLINE void stream_line(char* out, const char* src) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(src));
#elif defined(__AVX__)
  for (int i = 0; i < kLine; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
#elif defined(__SSE2__)
  for (int i = 0; i < kLine; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
#else
  std::memcpy(out, src, kLine);
#endif
}

// What was streamed is seen by whoever sees what the thread writes next.
PYPAR_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

PYPAR_INLINE bool is_aligned_to_line(const void* p) {
  return (reinterpret_cast<intptr_t>(p) & (kLine - 1)) == 0;
}

// Four pages at once: a core's prefetcher stops at the end of a page, and one stream leaves it waiting. 96 MB
// took 8.5 ms this way, 10.6 ms page by page, 13 ms with stores through the caches, which read `out` first.
static inline void stream(const char* src, char* out, int64_t bytes) {
  constexpr int64_t kPage = 4096, kPages = 4;
  const int64_t head = smaller(bytes, -reinterpret_cast<intptr_t>(out) & (kLine - 1));
  std::memcpy(out, src, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + kPages * kPage <= bytes; at += kPages * kPage) {
    for (int64_t line = at; line < at + kPage; line += kLine) {
      for (int64_t page = 0; page < kPages; ++page)
        stream_line(out + line + page * kPage, src + line + page * kPage);
    }
  }
  for (; at + kLine <= bytes; at += kLine) stream_line(out + at, src + at);
  std::memcpy(out + at, src + at, static_cast<size_t>(bytes - at));
  end_stream();
}

// out[size] = x[size], rounded. `end_stream` is the caller's.
template <class Element>
static void stream_row(const float* x, Element* out, int64_t size) {
  constexpr int64_t kVectors = kLine / (kWidth * static_cast<int64_t>(sizeof(Element)));  // of a line
  static_assert(kVectors > 0, "a vector is at most a line");
  int64_t i = 0;
  if (is_aligned_to_line(out)) {
    alignas(kLine) Element line[kVectors * kWidth];
    for (; i + kVectors * kWidth <= size; i += kVectors * kWidth) {
      for (int64_t v = 0; v < kVectors; ++v) store(line + v * kWidth, load(x + i + v * kWidth));
      stream_line(reinterpret_cast<char*>(out + i), reinterpret_cast<const char*>(line));
    }
  }
  for (; i < size; i += kWidth) {
    const int64_t count = smaller(kWidth, size - i);
    store_first(out + i, load_first(x + i, count), count);
  }
}

}  // namespace pypar::PYPAR_ISA
