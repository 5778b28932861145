// What moves between the lanes of vectors.
#pragma once

#include "core/simd.h"

namespace pypar::PYPAR_ISA {

// Lanes of a and b by turns: a0 b0 a1 b1 ... from their lower halves, or their upper halves.
template <bool kUpper>
PYPAR_INLINE Float interleave(Float a, Float b) {
#if defined(__AVX512F__)
  const Int index = lane_indices() / 2 + (kUpper ? kWidth / 2 : 0) + (lane_indices() % 2) * kWidth;
  return (Float)_mm512_permutex2var_ps((__m512)a, (__m512i)index, (__m512)b);
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b),
               high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return (Float)_mm256_permute2f128_ps(low, high, kUpper ? 0x31 : 0x20);
#else
  constexpr int kStart = kUpper ? kWidth / 2 : 0;
  return Float{a[kStart], b[kStart], a[kStart + 1], b[kStart + 1]};
#endif
}

// Half as many sums of lanes as before, of a and of b by turns.
PYPAR_INLINE Float add_interleaved(Float a, Float b) {
  return interleave<false>(a, b) + interleave<true>(a, b);
}

}  // namespace pypar::PYPAR_ISA
