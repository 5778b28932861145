// The online softmax over blocks of keys, lanes being query rows (Milakov and Gimelshein, arXiv 1805.02867).
#pragma once

#include "attention/cpu/scores.h"

namespace pypar::PYPAR_ISA {

// A row's reference value, subtracted from its scores, follows the row's maximum only when that has grown by
// more than this (in powers of two), which spares most rescaling. Sums stay below 2^8 times what they would
// be.
constexpr float kSlack = 8.0f;

// The state of one block of query rows.
struct RowBlock {
  void *queries, *out;          // of the arithmetic
  float* reference;             // [kBlock], what is subtracted from a row's scores
  float *sum, *excess;          // [kBlock], of 2^((score - reference) * factor): sum - excess
  int32_t *begin, *end;         // [kBlock], the keys that a row sees
  float* slope;                 // [kBlock], as in RowTerms, like the next three
  uint32_t *position, *stream;  // [kBlock]
  int64_t* apart;               // [kBlock]
  int64_t first, count;         // rows
  Range keys;                   // that its rows see together
};

// The keys of a block, counted from its first, that some of the rows in these lanes see, and all of them.
struct Seen {
  Int begin, end;
  Range some, all;

  Seen(const RowBlock& block, int64_t row, int64_t first_key, int64_t num_keys) {
    std::memcpy(&begin, block.begin + row, sizeof(begin));
    std::memcpy(&end, block.end + row, sizeof(end));
    begin -= static_cast<int32_t>(first_key);
    end -= static_cast<int32_t>(first_key);
    some.begin = smaller(num_keys, larger(0, begin[0]));
    some.end = larger(some.begin, smaller(num_keys, end[kWidth - 1]));
    all.begin = smaller(some.end, larger(some.begin, begin[kWidth - 1]));
    all.end = larger(all.begin, smaller(some.end, end[0]));
  }
};

PYPAR_INLINE Int visible(const Seen& seen, int64_t key, Float score) {
  const Int k = broadcast_int(static_cast<int32_t>(key));
  return (k >= seen.begin) & (k < seen.end) & (Int)(score != broadcast(-__builtin_inff()));
}

template <bool kMasked>
PYPAR_INLINE void find_top(const float* column, int64_t begin, int64_t end, const Seen& seen, Float* top) {
  int64_t key = begin;
  if (!kMasked) {
    for (; key + 2 <= end; key += 2) {
      top[0] = max(top[0], load(column + key * kBlock));
      top[1] = max(top[1], load(column + (key + 1) * kBlock));
    }
  }
  for (; key < end; ++key) {
    const Float score = load(column + key * kBlock);
    top[0] = max(top[0], kMasked ? select(visible(seen, key, score), score, top[0]) : score);
  }
}

struct Exponent {
  Float reference;
  float factor, least;
};

PYPAR_INLINE Float power(const Exponent& e, Float score) {
  return exp2_of_product(score - e.reference, e.factor, e.least);
}

// A sum that loses nothing (Kahan): an error in it is one that all of a row's output has, and that backward's
// differences make much larger.
struct Total {
  Float sum, excess;

  __attribute__((always_inline)) void add(Float x) {
    const Float y = x - excess, t = sum + y;
    excess = (t - sum) - y;
    sum = t;
  }
  // Until sum - excess rounds to sum. Then zeros, of keys that only other rows see, change nothing: neither
  // those before a row's own keys nor, if this follows, those behind them.
  __attribute__((always_inline)) void settle() { add(zero()); }
};

// Scores of the keys [begin, end) -> probabilities. Both are multiples of kQuad: four keys are summed before
// they are added to the total, and which four, must not depend on what the other rows of the vector see.
constexpr int64_t kQuad = 4;
template <bool kMasked>
PYPAR_INLINE void exponentiate(float* column, int64_t begin, int64_t end, const Seen& seen, const Exponent& e,
                               Total* total) {
  const auto probability = [&](int64_t key) __attribute__((always_inline)) {
    float* const at = column + key * kBlock;
    const Float score = load(at);
    Float p = power(e, score);
    if (kMasked) p = select(visible(seen, key, score), p, zero());
    store(at, p);
    return p;
  };
  for (int64_t key = begin; key < end; key += kQuad) {
    const Float p0 = probability(key), p1 = probability(key + 1);
    const Float p2 = probability(key + 2), p3 = probability(key + 3);
    total->add((p0 + p1) + (p2 + p3));
  }
}

PYPAR_INLINE void store_zeros(float* column, int64_t begin, int64_t end) {
  for (int64_t key = begin; key < end; ++key) store(column + key * kBlock, zero());
}

// scores[key][row] -> 2^((score - reference) * factor), for keys [0, num_keys) of one block, and the rows'
// new references and sums. Unseen scores become 0. `rescale` [kBlock] receives by how much the rows' output
// must be multiplied; false if by nothing.
static bool online_softmax(const RowBlock& block, const ScoreTerms& terms, float* scores, int64_t first_key,
                           int64_t num_keys, float* rescale) {
  bool any_rescale = false;
  const float factor = terms.factor;
  const float slack = factor > 1e-30f ? kSlack / factor : kSlack * 1e30f;
  const float least = factor > 1e-30f ? -200.0f / factor : -200.0f * 1e30f;
  const Float lowest = broadcast(-__builtin_inff());
  for (int64_t row = 0; row < block.count; row += kWidth) {
    float* column = scores + row;
    Seen seen(block, row, first_key, num_keys);
    if (terms.hides) seen.all = {seen.some.end, seen.some.end};
    Float top[2] = {lowest, lowest};
    find_top<true>(column, seen.some.begin, seen.all.begin, seen, top);
    find_top<false>(column, seen.all.begin, seen.all.end, seen, top);
    find_top<true>(column, seen.all.end, seen.some.end, seen, top);
    top[0] = max(top[0], top[1]);
    const Float old = load(block.reference + row);
    const Int grown = top[0] > old + slack;
    Float reference = old, shrink = broadcast(1.0f);
    Total total{load(block.sum + row), load(block.excess + row)};
    if (any(grown)) {
      reference = select(grown, top[0], old);
      shrink = select(grown & (old > lowest), exp2_of_product(old - reference, factor, least), shrink);
      total.sum *= shrink;
      total.excess *= shrink;
      total.settle();
      any_rescale = true;
      store(block.reference + row, reference);
    }
    store(rescale + row, shrink);
    const Exponent e{reference, factor, least};
    const int64_t begin = seen.some.begin / kQuad * kQuad, end = round_up(seen.some.end, kQuad);
    const int64_t all_begin = smaller(end, round_up(seen.all.begin, kQuad));
    const int64_t all_end = larger(all_begin, seen.all.end / kQuad * kQuad);
    store_zeros(column, 0, begin);
    exponentiate<true>(column, begin, all_begin, seen, e, &total);
    exponentiate<false>(column, all_begin, all_end, seen, e, &total);
    exponentiate<true>(column, all_end, end, seen, e, &total);
    total.settle();
    store_zeros(column, end, num_keys);
    store(block.sum + row, total.sum);
    store(block.excess + row, total.excess);
  }
  return any_rescale;
}

}  // namespace pypar::PYPAR_ISA
