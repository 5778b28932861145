// Scores of a few query rows, lanes being elements of the head: what decoding reads keys by.
#pragma once

#include "attention_tile.h"

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

// The rows (key, head) that come next, key by key.
template <class Element>
struct Ahead {
  const Element* row;
  int64_t size, head_stride, to_next_key, heads, head, left;

  Ahead(const Element* first, int64_t row_size, int64_t key_stride, int64_t stride, int64_t num_heads,
        int64_t num_keys)
      : row(first),
        size(row_size),
        head_stride(stride),
        to_next_key(key_stride - num_heads * stride),
        heads(num_heads),
        head(0),
        left(num_keys * num_heads) {}
};

template <class Element>
PYPAR_INLINE void fetch_next(Ahead<Element>* ahead) {
  if (ahead->left <= 0) return;
  --ahead->left;
  const auto* bytes = reinterpret_cast<const char*>(ahead->row);
  for (int64_t i = 0; i < ahead->size * static_cast<int64_t>(sizeof(Element)); i += 64) {
    __builtin_prefetch(bytes + i, 0, 2);
  }
  ahead->row += ahead->head_stride;
  if (++ahead->head == ahead->heads) {
    ahead->head = 0;
    ahead->row += ahead->to_next_key;
  }
}

// scores[row][key] = q[row] . k[key] for kTile rows and num_keys keys. q: [kTile][padded], zero beyond
// `size`.
template <class Element, int kTile>
static void decode_products(const float* q, int64_t padded, const Element* k, int64_t key_stride,
                            int64_t num_keys, Ahead<Element>* ahead, int64_t size, float* scores) {
  for (int64_t key = 0; key < num_keys; key += kDotKeys) {
    const Element* rows[kDotKeys];
    for (int64_t i = 0; i < kDotKeys; ++i) {
      rows[i] = k + smaller(key + i, num_keys - 1) * key_stride;
      fetch_next(ahead);
    }
    Float sums[kDotKeys][kTile];
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) sums[i][r] = zero();
    }
    for (int64_t j = 0; j < size; j += kWidth) {
#pragma GCC unroll 4
      for (int i = 0; i < kDotKeys; ++i) {
        const Float x = load_up_to(rows[i] + j, size - j);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; ++r) sums[i][r] += x * load(q + r * padded + j);
      }
    }
    for (int64_t i = 0; i < smaller(kDotKeys, num_keys - key); ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) scores[r * kBlock + key + i] = lane_sum(sums[i][r]);
    }
  }
}

}  // namespace pypar::PYPAR_ISA
