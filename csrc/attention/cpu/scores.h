// What may happen to a score between the first product and the softmax, and back: cap, bias, ALiBi, dropout.
#pragma once

#include "attention/cpu/block_products.h"
#include "attention/cpu/tile_scheduler.h"
#include "core/activations.h"

namespace pypar::PYPAR_ISA {

// What a score of the first product becomes, the same for a whole call.
struct ScoreTerms {
  bool general;  // scores pass through `final_scores`; otherwise they stay the plain products
  bool hides;    // a score may become -inf
  bool dropout;
  // The sign goes into the packed q, so that a larger score is a larger exponent. The scale comes in after
  // the subtraction of the row's reference, by fused multiply-add, unless it was needed before.
  float sign;
  float unit;    // a score times unit is the natural logarithm's, never negative
  float factor;  // unit * log2(e)
  float keep;    // 1 / (1 - dropout_p)
  uint32_t key[2];
};

static inline ScoreTerms score_terms(const AttentionProblem& p) {
  ScoreTerms t{};
  t.general = p.softcap > 0.0f || p.bias.data || p.alibi_slopes;
  t.hides = p.bias.data != nullptr;
  t.dropout = p.dropout_p > 0.0f;
  t.sign = !t.general && p.scale < 0.0f ? -1.0f : 1.0f;
  t.unit = t.general ? 1.0f : t.sign * p.scale;
  t.factor = t.unit * kLog2e;
  t.keep = 1.0f / (1.0f - p.dropout_p);
  if (t.dropout) {
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    t.key[0] = static_cast<uint32_t>(seed);
    t.key[1] = static_cast<uint32_t>(seed >> 32);
  }
  return t;
}

// ---- Philox 2x32-10 (Salmon et al., Random123, SC 2011)

constexpr uint32_t kPhiloxMultiplier = 0xD256D193u;
constexpr uint32_t kPhiloxStep = 0x9E3779B9u;

PYPAR_INLINE UInt broadcast_uint(uint32_t x) { return x - UInt{}; }

// The halves of the 64-bit products x * kPhiloxMultiplier.
PYPAR_INLINE void multiply_wide(UInt x, UInt* high, UInt* low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(kPhiloxMultiplier));
  const __m512i even = _mm512_mul_epu32((__m512i)x, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factor);
  *high = (UInt)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  *low = (UInt)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(kPhiloxMultiplier));
  const __m256i even = _mm256_mul_epu32((__m256i)x, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
  *high = (UInt)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = (UInt)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t product = static_cast<uint64_t>(x[i]) * kPhiloxMultiplier;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

PYPAR_INLINE UInt philox(UInt c0, UInt c1, UInt key) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    UInt high, low;
    multiply_wide(c0, &high, &low);
    c0 = high ^ key ^ c1;
    c1 = low;
    key += kPhiloxStep;
  }
  return c0;
}

static inline void philox_scalar(uint32_t* c0, uint32_t* c1, uint32_t key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product = static_cast<uint64_t>(*c0) * kPhiloxMultiplier;
    *c0 = static_cast<uint32_t>(product >> 32) ^ key ^ *c1;
    *c1 = static_cast<uint32_t>(product);
    key += kPhiloxStep;
  }
}

// The key of one batch element's and head's random numbers.
static inline uint32_t dropout_stream(const AttentionProblem& p, const ScoreTerms& t, int64_t batch,
                                      int64_t head) {
  auto c0 = static_cast<uint32_t>(p.batch_start + batch), c1 = static_cast<uint32_t>(p.head_start + head);
  philox_scalar(&c0, &c1, t.key[0]);
  philox_scalar(&c0, &c1, t.key[1]);
  return c0;
}

// keep where the element stays, 0 where it is dropped.
PYPAR_INLINE Float kept(UInt key_position, UInt query_position, UInt stream, uint32_t threshold, float keep) {
  const UInt random = philox(key_position, query_position, stream);
  return select((Int)(random >= broadcast_uint(threshold)), broadcast(keep), zero());
}

PYPAR_INLINE Float magnitude(Float x) { return as_float(as_int(x) & 0x7fffffff); }

// ---- scores

// What is known of one row: where its scores' bias is, how far it is from a key.
struct RowTerms {
  int64_t apart;  // its position minus that of key 0 of the sequence
  float slope;
  uint32_t position, stream;
  int64_t head;
};

static inline RowTerms row_terms(const AttentionProblem& p, const ScoreTerms& terms, const Sequence& s,
                                 int64_t key_head, int64_t row) {
  const int64_t group = p.N / p.G, t = row / group;
  RowTerms r{};
  r.head = key_head * group + row % group;
  r.apart = s.q_start + p.step * t - s.k_start;
  r.slope = p.alibi_slopes ? p.alibi_slopes[s.batch * p.alibi_batch_stride + r.head] : 0.0f;
  r.position = static_cast<uint32_t>(s.q_start + p.step * t);
  if (terms.dropout) r.stream = dropout_stream(p, terms, s.batch, r.head);
  return r;
}

// A distance of positions that fits 32 bits; what is larger has no use for being exact.
PYPAR_INLINE int32_t near(int64_t distance) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return static_cast<int32_t>(larger(-kMost, smaller(kMost, distance)));
}

// q . k -> the score. `capped` receives tanh.
PYPAR_INLINE Float final_score(const AttentionProblem& p, Float product, Float bias, Float slope,
                               Int distance, Float* capped) {
  Float x = product * p.scale;
  if (p.softcap > 0.0f) {
    *capped = tanh(x / p.softcap);
    x = *capped * p.softcap;
  }
  if (p.bias.data) x = select((Int)(bias == -__builtin_inff()), bias, x + bias);  // x may be NaN or inf
  if (p.alibi_slopes) x -= slope * magnitude(__builtin_convertvector(distance, Float));
  return x;
}

PYPAR_INLINE Rows bias_rows(const AttentionProblem& p, int64_t batch, int64_t key_head, int64_t first_key) {
  const AttentionBias& b = p.bias;
  const int64_t group = p.N / p.G;
  const int64_t offset = batch * b.batch_stride + key_head * group * b.head_stride + first_key * b.key_stride;
  char* data = static_cast<char*>(const_cast<void*>(b.data)) + offset * element_size(b.dtype);
  return Rows{data, b.query_stride, b.head_stride, b.key_stride, group, b.dtype};
}

// The keys [begin, end) of one row's products, lanes being keys, counted from `first_key`: products ->
// scores. Where asked for, `slope` [kBlock] receives the cap's derivative. `bias` [kBlock]: null without.
static void final_row(const AttentionProblem& p, const RowTerms& row, int64_t first_key, int64_t begin,
                      int64_t end, const float* bias, float* scores, float* slope) {
  const int32_t apart = near(row.apart - p.step * first_key);
  const Int distance = apart - lane_indices() * static_cast<int32_t>(p.step);
  for (int64_t j = begin / kWidth * kWidth; j < end; j += kWidth) {
    Float capped = zero();
    const Int d = distance - static_cast<int32_t>(j * p.step);
    const Float x =
        final_score(p, load(scores + j), bias ? load(bias + j) : zero(), broadcast(row.slope), d, &capped);
    store(scores + j, x);
    if (slope) store(slope + j, 1.0f - capped * capped);
  }
}

// keep or 0 for the keys [begin, end) of one row.
static void kept_row(const AttentionProblem& p, const ScoreTerms& t, const Sequence& s, const RowTerms& row,
                     int64_t first_key, int64_t begin, int64_t end, float* keep) {
  const auto step = static_cast<uint32_t>(p.step);
  const auto start = static_cast<uint32_t>(s.k_start + p.step * first_key);
  for (int64_t j = begin / kWidth * kWidth; j < end; j += kWidth) {
    const UInt position = ((UInt)lane_indices() + static_cast<uint32_t>(j)) * step + start;
    store(keep + j, kept(position, broadcast_uint(row.position), broadcast_uint(row.stream),
                         p.dropout_threshold, t.keep));
  }
}

}  // namespace pypar::PYPAR_ISA
