// Few query rows against many keys: keys and values are read once, from where they lie, by as many tasks as
// there are splits. What it costs is the memory's bandwidth.
#pragma once

#include "attention_dots.h"
#include "attention_finish.h"
#include "attention_scores.h"

namespace pypar::PYPAR_ISA {

// All heads take turns at so few keys, and meanwhile fetch the next ones in the order of the memory, which a
// walk along one head is not: with 8 heads of 256 bytes it meets a new page every other key.
constexpr int64_t kDecodeBlock = 32;

// out[row][kVecs of it] += sum of p[row][key] v[key].
template <class Element, int kTile, int kUsed>
static void decode_values(const float* p, const Element* v, int64_t key_stride, int64_t num_keys,
                          Ahead<Element>* ahead, int64_t size, float* out, int64_t out_stride) {
  Float sums[kTile][kUsed];
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kUsed; ++j) sums[r][j] = zero();
  }
  for (int64_t key = 0; key < num_keys; ++key) {
    const Element* row = v + key * key_stride;
    if (ahead) fetch_next(ahead);
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
                              Ahead<Element>* ahead, int64_t size, float* out, int64_t out_stride) {
  constexpr int kWide = kTile == 1 ? 8 : kVecs;
  for (int64_t j = 0; j < size;) {
    const bool wide = j + kWide * kWidth <= size;
    if (wide) {
      decode_values<Element, kTile, kWide>(p, v + j, key_stride, num_keys, ahead, size, out + j, out_stride);
    } else {
      decode_values<Element, kTile, 1>(p, v + j, key_stride, num_keys, ahead, size - j, out + j, out_stride);
    }
    j += wide ? kWide * kWidth : kWidth;
    ahead = nullptr;
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
  const float new_top = lane_max(top), old = *reference;
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
  *sum = *sum * shrink + lane_sum(total);
  return shrink;
}

// Of one key/value head: its rows' operands and sums.
struct DecodeHead {
  float *q, *out;
  float reference[kDecodeRows], sum[kDecodeRows];
  RowTerms row[kDecodeRows];
};

template <class Element>
struct Decoder {
  const AttentionForward& a;
  const AttentionProblem& p;
  const Sequence& s;
  const int64_t rows, padded_h, padded_hv;
  const ScoreTerms terms;
  DecodeHead* heads;
  float *scores, *bias, *keep, *row_scratch;
  Range seen[kDecodeRows];

  Decoder(const AttentionForward& arguments, const Sequence& sequence, int64_t num_rows)
      : a(arguments),
        p(arguments.problem),
        s(sequence),
        rows(num_rows),
        padded_h(round_up(p.H, kWidth)),
        padded_hv(padded_size(p.Hv)),
        terms(score_terms(p)) {
    const int64_t head_floats = kDecodeRows * (padded_h + padded_hv), shared = (kDecodeRows + 2) * kBlock;
    const int64_t heads_bytes = round_up(p.G * static_cast<int64_t>(sizeof(DecodeHead)), 64);
    char* memory =
        static_cast<char*>(thread_scratch(heads_bytes + (p.G * head_floats + shared + padded_hv) * 4));
    heads = reinterpret_cast<DecodeHead*>(memory);
    scores = reinterpret_cast<float*>(memory + heads_bytes);
    bias = scores + kDecodeRows * kBlock;
    keep = bias + kBlock;
    row_scratch = keep + kBlock;
    float* operands = row_scratch + padded_hv;
    for (int64_t i = 0; i < p.G * head_floats; i += kWidth) store(operands + i, zero());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = row / (p.N / p.G);
      seen[row] = keys_seen(s, t, t);
    }
    for (int64_t head = 0; head < p.G; ++head) begin_head(head, operands + head * head_floats);
  }

  void begin_head(int64_t index, float* operands) {
    DecodeHead& head = heads[index];
    head.q = operands;
    head.out = operands + kDecodeRows * padded_h;
    const Rows source = rows_of(p.q, s.batch, s.q_begin, index, p.N / p.G);
    for (int64_t row = 0; row < rows; ++row) {
      float* q = head.q + row * padded_h;
      pack_row(source, row, p.H, q);
      if (terms.sign < 0.0f) {
        for (int64_t i = 0; i < p.H; ++i) q[i] = -q[i];
      }
      head.row[row] = row_terms(p, terms, s, index, row);
      head.reference[row] = -__builtin_inff();
      head.sum[row] = 0.0f;
    }
  }

  const Element* at(const AttentionTensor& x, int64_t head, int64_t key) const {
    return rows_of(x, s.batch, s.k_begin, head, 1).template row<Element>(key);
  }

  // Keys [begin, end) of all heads.
  void run(int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; key += kDecodeBlock) {
      const int64_t count = smaller(kDecodeBlock, end - key);
      const int64_t next = smaller(kDecodeBlock, end - key - count);
      Ahead<Element> k(at(p.k, 0, key + count), p.H, p.k.position_stride, p.k.head_stride, p.G, next);
      Ahead<Element> v(at(p.v, 0, key + count), p.Hv, p.v.position_stride, p.v.head_stride, p.G, next);
      for (int64_t head = 0; head < p.G; ++head) attend(head, key, count, &k, &v);
    }
  }

  void attend(int64_t index, int64_t first_key, int64_t num_keys, Ahead<Element>* k_ahead,
              Ahead<Element>* v_ahead) {
    DecodeHead& head = heads[index];
    const Element *k = at(p.k, index, first_key), *v = at(p.v, index, first_key);
    const int64_t k_stride = p.k.position_stride, v_stride = p.v.position_stride;
    if (rows == 1) {
      decode_products<Element, 1>(head.q, padded_h, k, k_stride, num_keys, k_ahead, p.H, scores);
      soften_one(index, 0, first_key, num_keys);
      decode_all_values<Element, 1>(scores, v, v_stride, num_keys, v_ahead, p.Hv, head.out, padded_hv);
      return;
    }
    for (int64_t row = 0; row < rows; row += kDecodeTile) {
      decode_products<Element, kDecodeTile>(head.q + row * padded_h, padded_h, k, k_stride, num_keys, k_ahead,
                                            p.H, scores + row * kBlock);
    }
    for (int64_t row = 0; row < rows; ++row) soften_one(index, row, first_key, num_keys);
    for (int64_t row = 0; row < rows; row += kDecodeTile) {
      decode_all_values<Element, kDecodeTile>(scores + row * kBlock, v, v_stride, num_keys, v_ahead, p.Hv,
                                              head.out + row * padded_hv, padded_hv);
    }
  }

  void soften_one(int64_t index, int64_t row, int64_t first_key, int64_t num_keys) {
    DecodeHead& head = heads[index];
    float* const x = scores + row * kBlock;
    const int64_t begin = smaller(num_keys, larger(0, seen[row].begin - first_key));
    const int64_t end = larger(begin, smaller(num_keys, seen[row].end - first_key));
    if (terms.general) {
      if (p.bias.data) pack_row(bias_rows(p, s.batch, index, first_key), row, num_keys, bias);
      final_row(p, head.row[row], first_key, begin, end, p.bias.data ? bias : nullptr, x, nullptr);
    }
    const float shrink = soften_row(terms, begin, end, x, head.reference + row, head.sum + row);
    for (int64_t j = round_up(end, kWidth); j < num_keys; ++j) x[j] = 0.0f;
    if (terms.dropout) {
      kept_row(p, terms, s, head.row[row], first_key, begin, end, keep);
      for (int64_t j = begin / kWidth * kWidth; j < end; j += kWidth) {
        store(x + j, load(x + j) * load(keep + j));
      }
    }
    if (shrink == 1.0f) return;
    float* const sums = head.out + row * padded_hv;
    for (int64_t j = 0; j < padded_hv; j += kWidth) store(sums + j, load(sums + j) * shrink);
  }

  // `splits`: where the sums of one split of this head go; null if it is the only one.
  void finish(int64_t index, const Parts* splits, int64_t split) const {
    const DecodeHead& head = heads[index];
    double references[kDecodeRows], sums[kDecodeRows];
    for (int64_t row = 0; row < rows; ++row) {
      references[row] = static_cast<double>(head.reference[row]) * terms.unit;
      sums[row] = head.sum[row];
    }
    if (!splits) {
      const Parts parts{reinterpret_cast<char*>(references),
                        reinterpret_cast<char*>(sums),
                        reinterpret_cast<char*>(head.out),
                        padded_hv,
                        1,
                        0};
      finish_rows(a, s, index, 0, rows, parts, row_scratch);
      return;
    }
    const Parts target = splits->rows_from(0, split);
    std::memcpy(target.references, references, rows * 8);
    std::memcpy(target.sums, sums, rows * 8);
    std::memcpy(target.out, head.out, rows * padded_hv * 4);
  }
};

// One split of a sequence's keys; `splits`: the first head's, in the caller's memory.
template <class Element>
static void decode_as(const AttentionForward& a, const Sequence& s, const ForwardShape& shape, int64_t split,
                      const Parts& splits) {
  Decoder<Element> decoder(a, s, shape.rows);
  const Range keys = keys_seen(s, 0, s.T - 1);
  const int64_t begin = (shape.first_split + split) * shape.keys_per_split;
  decoder.run(larger(keys.begin, begin), smaller(keys.end, begin + shape.keys_per_split));
  for (int64_t head = 0; head < a.problem.G; ++head) {
    const Parts of_head = splits.of_head(head);
    decoder.finish(head, shape.num_splits > 1 ? &of_head : nullptr, split);
  }
}

static void decode(const AttentionForward& a, const Sequence& s, const ForwardShape& shape, int64_t split,
                   const Parts& splits) {
  switch (a.problem.q.dtype) {
    case kFloat32:
      decode_as<float>(a, s, shape, split, splits);
      break;
    case kBFloat16:
      decode_as<BFloat16>(a, s, shape, split, splits);
      break;
    default:
      decode_as<Float16>(a, s, shape, split, splits);
      break;
  }
}

}  // namespace pypar::PYPAR_ISA
