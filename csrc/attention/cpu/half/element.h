// The 16-bit type of one compilation: fp16 for the instruction set amx_fp16, which is compiled with
// PYPAR_FP16_TILES, bf16 for the others. What depends on it stands here: conversions, the exponential whose
// results are rounded to it, the product of two tiles, and what keeps fp16 in its range.
#pragma once

#include "core/registry.h"
#include "core/simd.h"

namespace pypar::PYPAR_ISA {
namespace half {

typedef uint16_t Bits;

#if defined(PYPAR_FP16_TILES)

constexpr int kHalf = kFloat16;
constexpr int16_t kInfinityBits = 0x7c00;

PYPAR_INLINE __m512 widen(__m256i x) { return _mm512_cvtph_ps(x); }
PYPAR_INLINE __m256i narrow(__m512 x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 32 values, one vector's after the other's.
PYPAR_INLINE __m512i narrow_two(__m512 first, __m512 second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(first)), narrow(second), 1);
}
// Words whose lower half is from `low` and whose upper half is from `high`.
PYPAR_INLINE __m512i merge_pairs(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, narrow_two(low, high));
}

// The forward's probabilities of 32 keys, and which of them are pairs: neighbours, as conversion leaves them.
constexpr bool kNeighbours = true;
PYPAR_INLINE void store_probabilities(__m512 first, __m512 second, Bits* to) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), narrow(first));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + 16), narrow(second));
}

constexpr float kRoundUp = 0.0f;

// (1 + kRoundUp) * 2^(f - 0.5) for f from 0 to 1, relative error 3e-6 (minimax with 2^0 exact, found by
// Lawson's iteration).
PYPAR_INLINE __m512 exp2_of_fraction(__m512 f) {
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0095828531f), _mm512_set1_ps(0.0367407185f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.1707556287f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.4900215993f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.7071087751f));
  return p;
}

// The backward's probabilities are at most 1, and of many keys each has little: times 2^12 they are normal
// numbers from 2^-26 on instead of 2^-14. dS = P * (dP - delta) has the magnitude of dout * v, which may be
// anything. A power of two, which is exact, brings its bound to 2^kScoreGradientBits, so that it does not
// overflow (65504) and stays normal down to 2^-27 of the bound; what is left to fp16 is rounding.
constexpr int kProbabilityBits = 12;
constexpr int kScoreGradientBits = 13;

// tile c += tile a * tile b. Compilers know this instruction late (GCC 13, binutils 2.40), so here is its
// code: VEX.128.F2.0F38.W0 5C, operands c, a and, complemented, b.
#  define PYPAR_MULTIPLY_TILE(c, a, b)                                              \
    __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((15 - (b)) << 3 | 3), \
                     "i"(0xc0 | (c) << 3 | (a)))

#else

constexpr int kHalf = kBFloat16;
constexpr int16_t kInfinityBits = 0x7f80;

PYPAR_INLINE __m512 widen(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
PYPAR_INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
PYPAR_INLINE __m512i narrow_two(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}
// Words whose lower half is from `low` and whose upper half is from `high`, both cut off to bf16.
PYPAR_INLINE __m512i merge_pairs(__m512 low, __m512 high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int32_t>(0xffff0000)), (__m512i)high,
                                   _mm512_srli_epi32((__m512i)low, 16), 0xca);
}

// The forward's probabilities of 32 keys; pairs are those of key i and key i + 16.
constexpr bool kNeighbours = false;
PYPAR_INLINE void store_probabilities(__m512 first, __m512 second, Bits* to) {
  _mm512_store_si512(to, merge_pairs(first, second));
}

// P and dS are rounded to bf16 by cutting off 16 bits, after a multiplication by 1 + kRoundUp, with which
// the errors of a sum over many scores cancel: an error is between -0.65 and 0.69 of the last place. What is
// to sum up to 1 is the values before they are cut off, divided by 1 + kRoundUp.
constexpr float kRoundUp = 0.0027076f;

// (1 + kRoundUp) * 2^(f - 0.5) for f from 0 to 1, relative error 1e-4 (minimax with 2^0 exact, found by
// Lawson's iteration), a fortieth of what rounding to bf16 loses.
PYPAR_INLINE __m512 exp2_of_fraction(__m512 f) {
  constexpr float kUp = 1.0f + kRoundUp;
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0550089312f * kUp), _mm512_set1_ps(0.1596975635f * kUp));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.4923286653f * kUp));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.7070351601f * kUp));
  return p;
}

// bf16 has fp32's range.
constexpr int kProbabilityBits = 0;
constexpr int kScoreGradientBits = 0;

#  if defined(__AMX_BF16__)
#    define PYPAR_MULTIPLY_TILE(c, a, b) _tile_dpbf16ps(c, a, b)
#  endif

#endif

// (1 + kRoundUp) * 2^(x - kShift) where `seen`, else 0; -inf gives 0. The shift puts 2^0 into the middle of
// the polynomial's range: the error is then as small around 2^0 as at it.
constexpr float kShift = 0.5f;
PYPAR_INLINE __m512 exp2_shifted(__mmask16 seen, __m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(seen, exp2_of_fraction(f), x);
}
PYPAR_INLINE __m512 exp2_shifted(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_of_fraction(f), x);
}

// The lower halves of words from `low`, the upper ones from `high`.
PYPAR_INLINE __m512i merge_words(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int32_t>(0xffff0000)), high, low, 0xca);
}

PYPAR_INLINE float larger_float(float a, float b) { return a > b ? a : b; }

}  // namespace half
}  // namespace pypar::PYPAR_ISA
