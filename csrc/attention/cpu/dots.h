// Scores of a few query rows, lanes being elements of the head: what decoding reads keys by.
#pragma once

#include "attention/cpu/block_products.h"

namespace pypar::PYPAR_ISA {

// Rows that share the reading of a key: their sums of kDotKeys keys stay in registers.
constexpr int64_t kDecodeTile = 4;
constexpr int64_t kDotKeys = kNumRegisters == 32 ? 4 : 2;
// As reduce_sum and reduce_max, in registers.
PYPAR_INLINE float lane_sum(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  return reduce_sum(x);
#endif
}

PYPAR_INLINE float lane_max(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  return reduce_max(x);
#endif
}

template <class Element>
PYPAR_INLINE Float load_up_to(const Element* p, int64_t count) {
  return count >= kWidth ? load(p) : load_partial(p, count);
}

// 2 * kWidth elements. Those of bf16 come as the even ones and the odd ones, which a shift and a mask part.
template <class Element>
PYPAR_INLINE void load_pair(const Element* p, Float* x) {
  x[0] = load(p);
  x[1] = load(p + kWidth);
}

PYPAR_INLINE void load_pair(const BFloat16* p, Float* x) {
  Int bits;
  std::memcpy(&bits, p, sizeof(bits));
  x[0] = as_float(bits << 16);
  x[1] = as_float(bits & static_cast<int32_t>(0xffff0000u));
}

// x[size] to the order of `load_pair`, or back; what does not fill a pair of vectors stays.
template <class Element>
static void part_pairs(float*, int64_t) {}
template <class Element>
static void join_pairs(float*, int64_t) {}

template <>
inline void part_pairs<BFloat16>(float* x, int64_t size) {
  for (; size >= 2 * kWidth; size -= 2 * kWidth, x += 2 * kWidth) {
    float parted[2 * kWidth];
    for (int i = 0; i < kWidth; ++i) {
      parted[i] = x[2 * i];
      parted[kWidth + i] = x[2 * i + 1];
    }
    std::memcpy(x, parted, sizeof(parted));
  }
}

template <>
inline void join_pairs<BFloat16>(float* x, int64_t size) {
  for (; size >= 2 * kWidth; size -= 2 * kWidth, x += 2 * kWidth) {
    float joined[2 * kWidth];
    for (int i = 0; i < kWidth; ++i) {
      joined[2 * i] = x[i];
      joined[2 * i + 1] = x[kWidth + i];
    }
    std::memcpy(x, joined, sizeof(joined));
  }
}

// sums[i] = the sum of x[i]'s lanes.
PYPAR_INLINE void lane_sums(const Float* x, float* sums) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 all = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  _mm_storeu_ps(sums, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
  for (int i = 0; i < kDotKeys; ++i) sums[i] = lane_sum(x[i]);
#endif
}

// scores[row][key] = q[row] . k[key] for kTile rows and num_keys keys, rounded up to kDotKeys. q:
// [kTile][padded], in the order of `load_pair`, zero beyond `size`.
template <class Element, int kTile>
static void decode_products(const float* q, int64_t padded, const Element* k, int64_t key_stride,
                            int64_t num_keys, int64_t size, float* scores, int64_t scores_stride) {
  for (int64_t key = 0; key < num_keys; key += kDotKeys) {
    const Element* rows[kDotKeys];
    for (int64_t i = 0; i < kDotKeys; ++i) rows[i] = k + smaller(key + i, num_keys - 1) * key_stride;
    Float sums[kTile][kDotKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) sums[r][i] = zero();
    }
    int64_t j = 0;
    for (; j + 2 * kWidth <= size; j += 2 * kWidth) {
#pragma GCC unroll 4
      for (int i = 0; i < kDotKeys; ++i) {
        Float x[2];
        load_pair(rows[i] + j, x);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; ++r) {
          const float* at = q + r * padded + j;
          sums[r][i] += x[0] * load(at);
          sums[r][i] += x[1] * load(at + kWidth);
        }
      }
    }
    for (; j < size; j += kWidth) {
#pragma GCC unroll 4
      for (int i = 0; i < kDotKeys; ++i) {
        const Float x = load_up_to(rows[i] + j, size - j);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; ++r) sums[r][i] += x * load(q + r * padded + j);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) lane_sums(sums[r], scores + r * scores_stride + key);
  }
}

}  // namespace pypar::PYPAR_ISA
