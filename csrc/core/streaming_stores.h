// Stores past the caches, for results that are larger than they are.
//
// An ordinary store reads the line that it writes to: in a copy of 16 MiB such stores make 19 GB/s where
// these make 36 (Zen 3, 32 MiB of third-level cache, one thread). Where a result stays in a cache, ordinary
// stores are the faster ones (of 4 MiB 62 against 49), and whoever reads the result next finds it there.
#pragma once

#include <cstring>

#include "core/rows.h"

namespace pypar::PYPAR_ISA {

// Results of so many bytes, with what was read beside them, have left most caches when they are read next.
constexpr int64_t kLeastStreamedBytes = int64_t{16} << 20;

// Whether rows of `size` elements that lie one after another from p on are stored so.
template <class Element>
PYPAR_INLINE bool is_streamed(const Element* p, int64_t rows, int64_t size) {
#if defined(__x86_64__)
  const bool is_aligned = reinterpret_cast<uintptr_t>(p) % 64 == 0 && size % kWidth == 0;
  return is_aligned && rows * size * static_cast<int64_t>(sizeof(Element)) >= kLeastStreamedBytes;
#else
  return false;
#endif
}

// store() of a whole vector to where is_streamed allows it.
template <class Element>
PYPAR_INLINE void stream(Element* p, Float x) {
#if defined(__x86_64__)
  constexpr size_t kBytes = kWidth * sizeof(Element);
  Element rounded[kWidth];
  store(rounded, x);
  if constexpr (kBytes == 8) {
    long long value;
    std::memcpy(&value, rounded, sizeof(value));
    _mm_stream_si64(reinterpret_cast<long long*>(p), value);
  } else if constexpr (kBytes == 16) {
    __m128i value;
    std::memcpy(&value, rounded, sizeof(value));
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), value);
  } else {
#  if defined(__AVX2__)
    for (size_t half = 0; half < kBytes / 32; ++half) {
      __m256i value;
      std::memcpy(&value, reinterpret_cast<const char*>(rounded) + 32 * half, sizeof(value));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + half, value);
    }
#  endif
  }
#else
  store(p, x);
#endif
}

// Before another thread reads what this one has streamed.
PYPAR_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// store_first, or stream where kStreams.
template <bool kStreams, class Element>
PYPAR_INLINE void put_first(Element* p, Float x, int64_t count) {
  if (kStreams) {
    stream(p, x);
  } else {
    store_first(p, x, count);
  }
}

// ---- copies, of bytes as they are

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

// Four pages at once: a core's prefetcher stops at the end of a page, and one stream leaves it waiting. 96 MB
// took 8.5 ms this way, 10.6 ms page by page, 13 ms with stores through the caches, which read `out` first.
static inline void stream_copy(const char* src, char* out, int64_t bytes) {
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
  finish_streams();
}

}  // namespace pypar::PYPAR_ISA
