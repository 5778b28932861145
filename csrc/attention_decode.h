// Few query rows against many keys: keys and values are read once, from where they lie, by as many tasks as
// there are splits. What it costs is the memory's bandwidth.
#pragma once

#include "attention_finish.h"
#include "attention_scores.h"

namespace pypar::PYPAR_ISA {

// Rows that share the reading of a key: their sums of kDotKeys keys stay in registers.
constexpr int64_t kDecodeTile = 4;
constexpr int64_t kDotKeys = kNumRegisters == 32 ? 4 : 2;
// Keys whose values are fetched while those of the present ones are multiplied.
constexpr int64_t kPrefetchKeys = 16;

template <class Element>
PYPAR_INLINE Float load_up_to(const Element* p, int64_t count) {
  return count >= kWidth ? load(p) : load_partial(p, count);
}

template <class Element>
PYPAR_INLINE void prefetch_row(const Element* row, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(Element))) __builtin_prefetch(row + i);
}

// scores[row][key] = q[row] . k[key] for kTile rows and num_keys keys. q: [kTile][padded], zero beyond
// `size`.
template <class Element, int kTile>
static void decode_products(const float* q, int64_t padded, const Element* k, int64_t key_stride,
                            int64_t num_keys, int64_t num_ahead, int64_t size, float* scores) {
  for (int64_t key = 0; key < num_keys; key += kDotKeys) {
    const Element* rows[kDotKeys];
    for (int64_t i = 0; i < kDotKeys; ++i) {
      rows[i] = k + smaller(key + i, num_keys - 1) * key_stride;
      if (key + i + kPrefetchKeys < num_ahead) prefetch_row(k + (key + i + kPrefetchKeys) * key_stride, size);
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
      for (int r = 0; r < kTile; ++r) scores[r * kBlock + key + i] = reduce_sum(sums[i][r]);
    }
  }
}

// out[row][kVecs of it] += sum of p[row][key] v[key].
template <class Element, int kTile, int kUsed>
static void decode_values(const float* p, const Element* v, int64_t key_stride, int64_t num_keys,
                          int64_t num_ahead, int64_t size, float* out, int64_t out_stride) {
  Float sums[kTile][kUsed];
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kUsed; ++j) sums[r][j] = zero();
  }
  for (int64_t key = 0; key < num_keys; ++key) {
    const Element* row = v + key * key_stride;
    if (key + kPrefetchKeys < num_ahead) prefetch_row(row + kPrefetchKeys * key_stride, kUsed * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kUsed; ++j) {
      const Float x = kUsed == 1 ? load_up_to(row, size) : load(row + j * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) sums[r][j] += x * p[r * kBlock + key];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kUsed; ++j) {
      float* sum = out + r * out_stride + j * kWidth;
      store(sum, load(sum) + sums[r][j]);
    }
  }
}

// A panel is as wide as the registers allow, so that one row's values are read in one go.
template <class Element, int kTile>
static void decode_all_values(const float* p, const Element* v, int64_t key_stride, int64_t num_keys,
                              int64_t num_ahead, int64_t size, float* out, int64_t out_stride) {
  constexpr int kWide = kTile == 1 ? 8 : kVecs;
  int64_t j = 0;
  for (; j + kWide * kWidth <= size; j += kWide * kWidth) {
    decode_values<Element, kTile, kWide>(p, v + j, key_stride, num_keys, num_ahead, size, out + j,
                                         out_stride);
  }
  for (; j < size; j += kWidth) {
    decode_values<Element, kTile, 1>(p, v + j, key_stride, num_keys, num_ahead, size - j, out + j,
                                     out_stride);
  }
}

// scores[row][key] of one row and block -> probabilities; `reference` and `sum` as in forward. Returns by how
// much the row's output must be multiplied.
static float soften_row(const ScoreTerms& terms, int64_t begin, int64_t end, float* scores, float* reference,
                        float* sum) {
  const float factor = terms.factor;
  const float least = factor > 1e-30f ? -200.0f / factor : -200.0f * 1e30f;
  const Float lowest = broadcast(-__builtin_inff());
  const int64_t first = begin / kWidth * kWidth, last = round_up(end, kWidth);
  Float top = lowest;
  for (int64_t j = first; j < last; j += kWidth) {
    const Int key = lane_indices() + static_cast<int32_t>(j);
    const Float score = load(scores + j);
    const Int seen = (key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end));
    store(scores + j, select(seen, score, lowest));
    top = max(top, select(seen, score, lowest));
  }
  const float new_top = reduce_max(top), old = *reference;
  float shrink = 1.0f;
  if (new_top > old) {
    if (old > -__builtin_inff()) shrink = exp2_of_product(broadcast(old - new_top), factor, least)[0];
    *reference = new_top;
  }
  Float total = zero();
  for (int64_t j = 0; j < first; j += kWidth) store(scores + j, zero());
  for (int64_t j = first; j < last; j += kWidth) {
    const Float score = load(scores + j);
    const Float p =
        select((Int)(score == lowest), zero(), exp2_of_product(score - *reference, factor, least));
    store(scores + j, p);
    total += p;
  }
  *sum = *sum * shrink + reduce_sum(total);
  return shrink;
}

template <class Element>
struct Decoder {
  const AttentionForward& a;
  const AttentionProblem& p;
  const Sequence& s;
  const int64_t head, rows, padded_h, padded_hv;
  const ScoreTerms terms;
  float *q, *out, *scores, *bias, *keep, *row_scratch;
  float reference[kDecodeRows], sum[kDecodeRows];
  RowTerms row_of[kDecodeRows];
  Range seen[kDecodeRows];

  Decoder(const AttentionForward& arguments, const Sequence& sequence, int64_t num_rows, int64_t key_head)
      : a(arguments),
        p(arguments.problem),
        s(sequence),
        head(key_head),
        rows(num_rows),
        padded_h(round_up(p.H, kWidth)),
        padded_hv(padded_size(p.Hv)),
        terms(score_terms(p)) {
    const int64_t total = kDecodeRows * (padded_h + padded_hv + kBlock) + 2 * kBlock + padded_hv;
    q = static_cast<float*>(thread_scratch(total * 4));
    out = q + kDecodeRows * padded_h;
    scores = out + kDecodeRows * padded_hv;
    bias = scores + kDecodeRows * kBlock;
    keep = bias + kBlock;
    row_scratch = keep + kBlock;
    for (int64_t i = 0; i < kDecodeRows * (padded_h + padded_hv); i += kWidth) store(q + i, zero());
    const int64_t group = p.N / p.G;
    const Rows source = rows_of(p.q, s.batch, s.q_begin, head, group);
    for (int64_t row = 0; row < rows; ++row) {
      pack_row(source, row, p.H, q + row * padded_h);
      if (terms.sign < 0.0f) {
        for (int64_t i = 0; i < p.H; ++i) q[row * padded_h + i] *= -1.0f;
      }
      row_of[row] = row_terms(p, terms, s, head, row);
      seen[row] = keys_seen(s, row / group, row / group);
      reference[row] = -__builtin_inff();
      sum[row] = 0.0f;
    }
  }

  // The keys [first_key, first_key + num_keys); num_ahead: so many more will follow.
  void attend(const Element* k, const Element* v, int64_t first_key, int64_t num_keys, int64_t num_ahead) {
    const int64_t k_stride = p.k.position_stride, v_stride = p.v.position_stride;
    k += first_key * k_stride;
    v += first_key * v_stride;
    for (int64_t row = 0; row < rows; row += tile()) {
      float *const left = q + row * padded_h, *const result = scores + row * kBlock;
      if (rows == 1) {
        decode_products<Element, 1>(left, padded_h, k, k_stride, num_keys, num_ahead, p.H, result);
      } else {
        decode_products<Element, kDecodeTile>(left, padded_h, k, k_stride, num_keys, num_ahead, p.H, result);
      }
    }
    for (int64_t row = 0; row < rows; ++row) soften_one(row, first_key, num_keys);
    for (int64_t row = 0; row < rows; row += tile()) {
      float *const left = scores + row * kBlock, *const result = out + row * padded_hv;
      if (rows == 1) {
        decode_all_values<Element, 1>(left, v, v_stride, num_keys, num_ahead, p.Hv, result, padded_hv);
      } else {
        decode_all_values<Element, kDecodeTile>(left, v, v_stride, num_keys, num_ahead, p.Hv, result,
                                                padded_hv);
      }
    }
  }

  int64_t tile() const { return rows == 1 ? 1 : kDecodeTile; }

  void soften_one(int64_t row, int64_t first_key, int64_t num_keys) {
    float* const x = scores + row * kBlock;
    const int64_t begin = larger(0, seen[row].begin - first_key);
    const int64_t end = larger(begin, smaller(num_keys, seen[row].end - first_key));
    if (terms.general) {
      if (p.bias.data) pack_bias(row, first_key, num_keys);
      final_row(p, row_of[row], first_key, begin, end, p.bias.data ? bias : nullptr, x, nullptr);
    }
    const float shrink = soften_row(terms, begin, end, x, reference + row, sum + row);
    for (int64_t j = round_up(end, kWidth); j < num_keys; ++j) x[j] = 0.0f;
    if (terms.dropout) {
      kept_row(p, terms, s, row_of[row], first_key, begin, end, keep);
      for (int64_t j = begin / kWidth * kWidth; j < end; j += kWidth)
        store(x + j, load(x + j) * load(keep + j));
    }
    if (shrink == 1.0f) return;
    float* const sums = out + row * padded_hv;
    for (int64_t j = 0; j < padded_hv; j += kWidth) store(sums + j, load(sums + j) * shrink);
  }

  void pack_bias(int64_t row, int64_t first_key, int64_t num_keys) {
    pack_row(bias_rows(p, s.batch, head, first_key), row, num_keys, bias);
  }

  void finish(const Parts* splits, int64_t split) {
    double references[kDecodeRows], sums[kDecodeRows];
    for (int64_t row = 0; row < rows; ++row) {
      references[row] = static_cast<double>(reference[row]) * terms.unit;
      sums[row] = sum[row];
    }
    if (!splits) {
      const Parts parts{reinterpret_cast<char*>(references),
                        reinterpret_cast<char*>(sums),
                        reinterpret_cast<char*>(out),
                        padded_hv,
                        1,
                        0};
      finish_rows(a, s, head, 0, rows, parts, row_scratch);
      return;
    }
    const Parts target = splits->rows_from(0, split);
    std::memcpy(target.references, references, rows * 8);
    std::memcpy(target.sums, sums, rows * 8);
    std::memcpy(target.out, out, rows * padded_hv * 4);
  }
};

template <class Element>
static void decode_as(const AttentionForward& a, const Sequence& s, const ForwardShape& shape, int64_t head,
                      int64_t split, const Parts* splits) {
  const AttentionProblem& p = a.problem;
  Decoder<Element> decoder(a, s, shape.rows, head);
  const Range keys = keys_seen(s, 0, s.T - 1);
  const int64_t split_begin = (shape.first_split + split) * shape.keys_per_split;
  const int64_t end = smaller(keys.end, split_begin + shape.keys_per_split);
  const auto* k = rows_of(p.k, s.batch, s.k_begin, head, 1).template row<Element>(0);
  const auto* v = rows_of(p.v, s.batch, s.k_begin, head, 1).template row<Element>(0);
  for (int64_t key = larger(keys.begin, split_begin); key < end; key += kBlock) {
    decoder.attend(k, v, key, smaller(kBlock, end - key), end - key);
  }
  decoder.finish(splits, split);
}

static void decode(const AttentionForward& a, const Sequence& s, const ForwardShape& shape, int64_t head,
                   int64_t split, const Parts* splits) {
  switch (a.problem.q.dtype) {
    case kFloat32:
      decode_as<float>(a, s, shape, head, split, splits);
      break;
    case kBFloat16:
      decode_as<BFloat16>(a, s, shape, head, split, splits);
      break;
    default:
      decode_as<Float16>(a, s, shape, head, split, splits);
      break;
  }
}

}  // namespace pypar::PYPAR_ISA
