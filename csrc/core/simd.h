// Vectors of one instruction set, in GCC's vector types: kWidth floats, arithmetic by operators (a * b + c
// becomes one fused multiply-add where the CPU has it). bf16 and fp16 exist in memory only. Accuracy: exp2
// and exp are within 2 units in the last place; results below 2^-126 are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#  if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm512_undefined_ps.
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#  endif
#  include <immintrin.h>
#endif

#ifndef PYPAR_ISA
#  error "simd.h belongs to code that is compiled for one instruction set: define PYPAR_ISA"
#endif

#define PYPAR_INLINE static inline __attribute__((always_inline))
#define PYPAR_INLINE_MEMBER inline __attribute__((always_inline))

namespace pypar::PYPAR_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kNumRegisters = 32;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kNumRegisters = 16;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kNumRegisters = 32;
#else
constexpr int kWidth = 4;
constexpr int kNumRegisters = 16;
#endif

typedef float Float __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));  // also the result of a comparison: -1 or 0
typedef uint32_t UInt __attribute__((vector_size(4 * kWidth)));
typedef uint16_t UShort __attribute__((vector_size(2 * kWidth)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PYPAR_INLINE int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}
PYPAR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYPAR_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

PYPAR_INLINE Float broadcast(float x) { return x - Float{}; }
PYPAR_INLINE Float zero() { return Float{}; }
PYPAR_INLINE Int broadcast_int(int32_t x) { return x - Int{}; }

// 0, 1, 2, ...
PYPAR_INLINE Int lane_indices() {
  Int lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

PYPAR_INLINE Float as_float(Int x) { return reinterpret_cast<Float>(x); }
PYPAR_INLINE Int as_int(Float x) { return reinterpret_cast<Int>(x); }

PYPAR_INLINE Float select(Int mask, Float yes, Float no) { return mask ? yes : no; }

// The greater of the two; b where either is NaN.
PYPAR_INLINE Float max(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

PYPAR_INLINE Float sqrt(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Float)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Float)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// x itself, which the compiler has to compute: a product that goes through here is rounded, and not fused
// with the addition that follows. For results that are the same on every processor.
PYPAR_INLINE Float rounded(Float x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// ---- memory

PYPAR_INLINE Float load(const float* p) {
  Float x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

PYPAR_INLINE void store(float* p, Float x) { std::memcpy(p, &x, sizeof(x)); }

PYPAR_INLINE float to_float(float x) { return x; }

PYPAR_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

PYPAR_INLINE float to_float(Float16 x) {
  // The exponent is moved by a multiplication, which also normalises subnormal numbers.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

PYPAR_INLINE void from_float(float x, float* p) { *p = x; }

// Rounds to nearest, ties to even; NaN stays NaN.
PYPAR_INLINE void from_float(float x, BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

PYPAR_INLINE void from_float(float x, Float16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds above 65504
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: adding 2^-1 leaves the bits wanted at the end of the fraction
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&half, &value, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | sign);
}

PYPAR_INLINE Float load(const BFloat16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // GCC makes five instructions of the conversion below.
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Float)_mm256_slli_epi32(bits, 16);
#else
  UShort bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<Float>(__builtin_convertvector(bits, UInt) << 16);
#endif
}

// In the upper half of each lane: rounded to nearest, ties to even; NaN stays NaN. What is below is anything.
PYPAR_INLINE UInt bfloat16_above(Float x) {
  const UInt bits = reinterpret_cast<UInt>(x);
  const UInt rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (x != x) ? UInt{} + 0x7fc00000 : rounded;
}

PYPAR_INLINE void store(BFloat16* p, Float x) {
#if defined(__AVX512BF16__)
  // Unlike the integers below, the instruction takes subnormal numbers for zero.
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &bits, sizeof(bits));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // GCC makes more of the conversion below.
  const __m256i words = (__m256i)(bfloat16_above(x) >> 16);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  std::memcpy(p, &narrow, sizeof(narrow));
#else
  const UShort narrow = __builtin_convertvector(bfloat16_above(x) >> 16, UShort);
  std::memcpy(p, &narrow, sizeof(narrow));
#endif
}

PYPAR_INLINE Float load(const Float16* p) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Float x;
  for (int i = 0; i < kWidth; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

PYPAR_INLINE void store(Float16* p, Float x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kWidth; ++i) from_float(x[i], p + i);
#endif
}

// The first `count` < kWidth elements; the other lanes are zero.
template <class Element>
PYPAR_INLINE Float load_partial(const Element* p, int64_t count) {
  Element padded[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <class Element>
PYPAR_INLINE void store_partial(Element* p, Float x, int64_t count) {
  Element padded[kWidth];
  store(padded, x);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// ---- pairs of neighbours in memory: the first of each pair, and the second

struct Pair {
  Float even, odd;
};

PYPAR_INLINE Pair apart(Float low, Float high) {
#if defined(__AVX512F__)
  const __m512i even = (__m512i)(lane_indices() * 2), odd = (__m512i)(lane_indices() * 2 + 1);
  return {(Float)_mm512_permutex2var_ps((__m512)low, even, (__m512)high),
          (Float)_mm512_permutex2var_ps((__m512)low, odd, (__m512)high)};
#elif defined(__AVX2__)
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps((__m256)low, (__m256)high, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps((__m256)low, (__m256)high, 0xdd));
  return {(Float)_mm256_permute4x64_pd(even, 0xd8), (Float)_mm256_permute4x64_pd(odd, 0xd8)};
#elif defined(__x86_64__)
  return {(Float)_mm_shuffle_ps((__m128)low, (__m128)high, 0x88),
          (Float)_mm_shuffle_ps((__m128)low, (__m128)high, 0xdd)};
#else
  Pair x;
  for (int i = 0; i < kWidth / 2; ++i) {
    x.even[i] = low[2 * i], x.odd[i] = low[2 * i + 1];
    x.even[kWidth / 2 + i] = high[2 * i], x.odd[kWidth / 2 + i] = high[2 * i + 1];
  }
  return x;
#endif
}

struct Neighbours {
  Float low, high;
};

PYPAR_INLINE Neighbours in_turn(Pair x) {
#if defined(__AVX512F__)
  const Int even = lane_indices() >> 1, odd = (lane_indices() & 1) << 4;
  return {(Float)_mm512_permutex2var_ps((__m512)x.even, (__m512i)(even + odd), (__m512)x.odd),
          (Float)_mm512_permutex2var_ps((__m512)x.even, (__m512i)(even + odd + kWidth / 2), (__m512)x.odd)};
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)x.even, (__m256)x.odd);
  const __m256 high = _mm256_unpackhi_ps((__m256)x.even, (__m256)x.odd);
  return {(Float)_mm256_permute2f128_ps(low, high, 0x20), (Float)_mm256_permute2f128_ps(low, high, 0x31)};
#elif defined(__x86_64__)
  return {(Float)_mm_unpacklo_ps((__m128)x.even, (__m128)x.odd),
          (Float)_mm_unpackhi_ps((__m128)x.even, (__m128)x.odd)};
#else
  Neighbours found;
  for (int i = 0; i < kWidth / 2; ++i) {
    found.low[2 * i] = x.even[i], found.low[2 * i + 1] = x.odd[i];
    found.high[2 * i] = x.even[kWidth / 2 + i], found.high[2 * i + 1] = x.odd[kWidth / 2 + i];
  }
  return found;
#endif
}

// kWidth pairs.
template <class Element>
PYPAR_INLINE Pair load_pairs(const Element* p) {
  return apart(load(p), load(p + kWidth));
}

template <class Element>
PYPAR_INLINE void store_pairs(Element* p, Pair x) {
  const Neighbours found = in_turn(x);
  store(p, found.low);
  store(p + kWidth, found.high);
}

PYPAR_INLINE Pair load_pairs(const BFloat16* p) {
  UInt words;  // the first of a pair is the lower half
  std::memcpy(&words, p, sizeof(words));
  return {reinterpret_cast<Float>(words << 16), reinterpret_cast<Float>(words & 0xffff0000)};
}

PYPAR_INLINE void store_pairs(BFloat16* p, Pair x) {
  const UInt words = (bfloat16_above(x.even) >> 16) | (bfloat16_above(x.odd) & 0xffff0000);
  std::memcpy(p, &words, sizeof(words));
}

// The first `count` < kWidth pairs; the other lanes are zero.
template <class Element>
PYPAR_INLINE Pair load_partial_pairs(const Element* p, int64_t count) {
  Element padded[2 * kWidth] = {};
  for (int64_t i = 0; i < 2 * count; ++i) padded[i] = p[i];
  return load_pairs(padded);
}

template <class Element>
PYPAR_INLINE void store_partial_pairs(Element* p, Pair x, int64_t count) {
  Element padded[2 * kWidth];
  store_pairs(padded, x);
  for (int64_t i = 0; i < 2 * count; ++i) p[i] = padded[i];
}

// ---- reductions over the lanes, in a fixed order

PYPAR_INLINE float reduce_sum(Float x) {
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

PYPAR_INLINE float reduce_max(Float x) {
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// Whether any lane of a comparison's result is set.
PYPAR_INLINE bool any(Int mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__aarch64__) && !defined(__clang__)
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// ---- functions

// 2^f for |f| <= 1/2, with 2^0 = 1 exactly: relative error 2e-9 (minimax, found by Lawson's iteration), so
// that what remains is the rounding of the last operations.
PYPAR_INLINE Float exp2_of_fraction(Float f) {
  constexpr float kC1 = 0.6931471824645996f, kC2 = 0.24022647738456726f, kC3 = 0.055503323674201965f,
                  kC4 = 0.00961843691766262f, kC5 = 0.0013398875016719103f, kC6 = 0.00015353361959569156f;
  Float p = f * kC6 + kC5;
  p = p * f + kC4;
  p = p * f + kC3;
  p = p * f + kC2;
  p = p * f + kC1;
  return p * f + 1.0f;
}

// 2^n * 2^f for |f| <= 1/2 and whole n in [-127, 128]; with AVX-512 any n.
PYPAR_INLINE Float exp2_of_parts(Float n, Float f) {
  const Float p = exp2_of_fraction(f);
#if defined(__AVX512F__)
  return (Float)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * as_float((__builtin_convertvector(n, Int) + 127) << 23);
#endif
}

// The nearest whole number, for |x| < 2^22.
PYPAR_INLINE Float round_to_whole(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Float shift = broadcast(12582912.0f);  // 1.5 * 2^23: the sum has no room for a fraction
  return (x + shift) - shift;
#endif
}

// 2^x. -inf gives 0, NaN gives NaN.
PYPAR_INLINE Float exp2(Float x) {
#if defined(__AVX512F__)
  x = max(broadcast(-256.0f), x);  // in this order NaN is kept; -inf would become NaN
#else
  x = max(broadcast(-127.0f), x);
  x = x > 128.0f ? broadcast(128.0f) : x;
#endif
  const Float n = round_to_whole(x);
  return exp2_of_parts(n, x - n);
}

// x * factor - y as if the product were exact, where the difference is small.
PYPAR_INLINE Float product_minus(Float x, float factor, Float y) {
#if defined(__FMA__) || defined(__aarch64__)
  return x * factor - y;
#else
  // Halves of at most 12 bits each, whose product is exact.
  const Float x_high = as_float(as_int(x) & static_cast<int32_t>(0xfffff000u));
  const float factor_high = as_float(as_int(broadcast(factor)) & static_cast<int32_t>(0xfffff000u))[0];
  return (x_high * factor_high - y) + ((x - x_high) * factor_high + x * (factor - factor_high));
#endif
}

// 2^(x * factor) for factor >= 0 and x * factor <= 128, as if the product were exact. `lowest` is -200 /
// factor or less: what lies below it gives 0.
PYPAR_INLINE Float exp2_of_product(Float x, float factor, float lowest) {
  x = max(broadcast(lowest), x);  // in this order NaN is kept
  const Float n = round_to_whole(x * factor);
#if defined(__AVX512F__)
  return exp2_of_parts(n, product_minus(x, factor, n));
#else
  return exp2_of_parts(max(broadcast(-127.0f), n), product_minus(x, factor, n));
#endif
}

// e^x, with x - n * ln(2) taken in two steps of which the first is exact.
PYPAR_INLINE Float exp(Float x) {
  x = max(broadcast(-88.0f), x);
  x = x > 89.0f ? broadcast(89.0f) : x;
  const Float n = round_to_whole(x * 1.44269504f);
  const Float rest = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const Float result = exp2_of_parts(n, rest * 1.44269504f);
  return x <= -88.0f ? zero() : result;
}

}  // namespace pypar::PYPAR_ISA
