// Few query rows against many keys: keys and values are read once, from where they lie, by as many tasks as
// there are splits. What it costs is the memory's bandwidth.
#pragma once

#include "attention/cpu/combine.h"
#include "attention/cpu/dots.h"
#include "attention/cpu/scores.h"

namespace pypar::PYPAR_ISA {

// Scores of so many keys of all heads are there at once: a multiple of kWidth and of kTurnKeys.
constexpr int64_t kDecodeBlock = 32;
// Where a key's heads lie side by side, they take turns at so few keys, so that memory is read nearly in its
// own order: one head's rows are 256 bytes of every 2 KiB, and each other one lies in a new page.
constexpr int64_t kTurnKeys = 4;
// Values take longer turns: each turn's sum is added to out, and few additions lose less.
constexpr int64_t kTurnValues = 16;

// out[row][2 * kPairs vectors, or one of `size` elements if 0] += sum of p[row][key] v[key].
template <class Element, int kTile, int kPairs>
static void decode_values(const float* p, int64_t p_stride, const Element* v, int64_t key_stride,
                          int64_t num_keys, int64_t size, float* out, int64_t out_stride) {
  constexpr int kUsed = kPairs == 0 ? 1 : 2 * kPairs;
  Float sums[kTile][kUsed];
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kUsed; ++j) sums[r][j] = zero();
  }
  for (int64_t key = 0; key < num_keys; ++key) {
    const Element* row = v + key * key_stride;
    Float x[kUsed];
    if (kPairs == 0) {
      x[0] = load_up_to(row, size);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; ++j) load_pair(row + 2 * j * kWidth, x + 2 * j);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kUsed; ++j) sums[r][j] += x[j] * p[r * p_stride + key];
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
static void decode_all_values(const float* p, int64_t p_stride, const Element* v, int64_t key_stride,
                              int64_t num_keys, int64_t size, float* out, int64_t out_stride) {
  constexpr int kWide = kTile == 1 ? 4 : kNumRegisters == 32 ? 2 : 1;
  int64_t j = 0;
  for (; j + 2 * kWide * kWidth <= size; j += 2 * kWide * kWidth) {
    decode_values<Element, kTile, kWide>(p, p_stride, v + j, key_stride, num_keys, 0, out + j, out_stride);
  }
  for (; kWide > 1 && j + 2 * kWidth <= size; j += 2 * kWidth) {
    decode_values<Element, kTile, 1>(p, p_stride, v + j, key_stride, num_keys, 0, out + j, out_stride);
  }
  for (; j < size; j += kWidth) {
    decode_values<Element, kTile, 0>(p, p_stride, v + j, key_stride, num_keys, size - j, out + j, out_stride);
  }
}

// scores[row][key] of one row and block -> probabilities; `reference` and `sum` as in forward. Returns by how
// much the row's output must be multiplied.
static float online_softmax_row(const ScoreTerms& terms, int64_t begin, int64_t end, float* scores,
                                float* reference, float* sum) {
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
  const int64_t rows, padded_rows, padded_h, padded_hv;
  const ScoreTerms terms;
  DecodeHead* heads;
  float *scores, *bias, *keep, *row_scratch;
  Range seen[kDecodeRows];

  Decoder(const AttentionForward& arguments, const Sequence& sequence, int64_t num_rows)
      : a(arguments),
        p(arguments.problem),
        s(sequence),
        rows(num_rows),
        padded_rows(num_rows == 1 ? 1 : round_up(num_rows, kDecodeTile)),
        padded_h(round_up(p.H, kWidth)),
        padded_hv(padded_size(p.Hv)),
        terms(score_terms(p)) {
    const int64_t head_floats = padded_rows * (padded_h + padded_hv),
                  shared = p.G * padded_rows * kDecodeBlock + 2 * kBlock;
    const int64_t heads_bytes = round_up(p.G * static_cast<int64_t>(sizeof(DecodeHead)), 64);
    char* memory =
        static_cast<char*>(thread_scratch(heads_bytes + (p.G * head_floats + shared + padded_hv) * 4));
    heads = reinterpret_cast<DecodeHead*>(memory);
    scores = reinterpret_cast<float*>(memory + heads_bytes);
    bias = scores + p.G * padded_rows * kDecodeBlock;
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
    head.out = operands + padded_rows * padded_h;
    const Rows source = rows_of(p.q, s.batch, s.q_begin, index, p.N / p.G);
    for (int64_t row = 0; row < rows; ++row) {
      float* q = head.q + row * padded_h;
      pack_row(source, row, p.H, q);
      if (terms.sign < 0.0f) {
        for (int64_t i = 0; i < p.H; ++i) q[i] = -q[i];
      }
      part_pairs<Element>(q, p.H);
      head.row[row] = row_terms(p, terms, s, index, row);
      head.reference[row] = -__builtin_inff();
      head.sum[row] = 0.0f;
    }
  }

  const Element* at(const AttentionTensor& x, int64_t head, int64_t key) const {
    return rows_of(x, s.batch, s.k_begin, head, 1).template row<Element>(key);
  }

  // Keys [begin, end) of all heads. While a block's keys are read, its values are fetched, and with those the
  // next block's keys.
  void run(int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; key += kDecodeBlock) {
      const int64_t count = smaller(kDecodeBlock, end - key);
      in_turns(p.k, kTurnKeys, count, [&](int64_t head, int64_t first, int64_t num_keys) {
        fetch(p.v, p.Hv, head, key + first, num_keys);
        multiply_keys(head, first, at(p.k, head, key + first), num_keys);
      });
      for (int64_t head = 0; head < p.G; ++head) {
        for (int64_t row = 0; row < rows; ++row) online_softmax_step(head, row, key, count);
      }
      in_turns(p.v, kTurnValues, count, [&](int64_t head, int64_t first, int64_t num_keys) {
        const int64_t next = key + kDecodeBlock + first;
        fetch(p.k, p.H, head, next, smaller(num_keys, end - next));
        add_values(head, first, at(p.v, head, key + first), num_keys);
      });
    }
  }

  // body(head, first key, number of keys) of a block's keys, `turn` at a time.
  template <class Body>
  void in_turns(const AttentionTensor& x, int64_t turn, int64_t count, const Body& body) const {
    const bool side_by_side = x.head_stride < x.position_stride;
    const int64_t step = side_by_side ? turn : kDecodeBlock;
    for (int64_t key = 0; key < count; key += step) {
      for (int64_t head = 0; head < p.G; ++head) body(head, key, smaller(step, count - key));
    }
  }

  // Asks the second-level cache for rows of one head.
  void fetch(const AttentionTensor& x, int64_t size, int64_t head, int64_t key, int64_t num_keys) const {
    const int64_t bytes = size * static_cast<int64_t>(sizeof(Element));
    for (int64_t i = 0; i < num_keys; ++i) {
      const auto* row = reinterpret_cast<const char*>(at(x, head, key + i));
      for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(row + j, 0, 2);
    }
  }

  float* scores_of(int64_t head, int64_t row) const {
    return scores + (head * padded_rows + row) * kDecodeBlock;
  }

  void multiply_keys(int64_t head, int64_t first, const Element* k, int64_t num_keys) const {
    const float* q = heads[head].q;
    const int64_t stride = p.k.position_stride;
    float* x = scores_of(head, 0) + first;
    if (rows == 1) {
      decode_products<Element, 1>(q, padded_h, k, stride, num_keys, p.H, x, kDecodeBlock);
      return;
    }
    for (int64_t row = 0; row < rows; row += kDecodeTile) {
      decode_products<Element, kDecodeTile>(q + row * padded_h, padded_h, k, stride, num_keys, p.H,
                                            x + row * kDecodeBlock, kDecodeBlock);
    }
  }

  // Whether a sum may have met a value that its row does not see and that is not finite.
  bool may_have_leaked() const {
    bool hidden = terms.hides;
    for (int64_t row = 1; row < rows; ++row)
      hidden |= seen[row].begin != seen[0].begin || seen[row].end != seen[0].end;
    if (!hidden) return false;
    Float sum = zero();
    for (int64_t head = 0; head < p.G; ++head) {
      const float* const out = heads[head].out;
      for (int64_t i = 0; i < rows * padded_hv; i += kWidth) sum += load(out + i) * 0.0f;
    }
    return any((Int)(sum != 0.0f));
  }

  void add_values(int64_t head, int64_t first, const Element* v, int64_t num_keys) const {
    float* out = heads[head].out;
    const int64_t stride = p.v.position_stride;
    const float* x = scores_of(head, 0) + first;
    if (rows == 1) {
      decode_all_values<Element, 1>(x, kDecodeBlock, v, stride, num_keys, p.Hv, out, padded_hv);
      return;
    }
    for (int64_t row = 0; row < rows; row += kDecodeTile) {
      decode_all_values<Element, kDecodeTile>(x + row * kDecodeBlock, kDecodeBlock, v, stride, num_keys, p.Hv,
                                              out + row * padded_hv, padded_hv);
    }
  }

  void online_softmax_step(int64_t index, int64_t row, int64_t first_key, int64_t num_keys) {
    DecodeHead& head = heads[index];
    float* const x = scores_of(index, row);
    const int64_t begin = smaller(num_keys, larger(0, seen[row].begin - first_key));
    const int64_t end = larger(begin, smaller(num_keys, seen[row].end - first_key));
    if (terms.general) {
      if (p.bias.data) pack_row(bias_rows(p, s.batch, index, first_key), row, num_keys, bias);
      final_row(p, head.row[row], first_key, begin, end, p.bias.data ? bias : nullptr, x, nullptr);
    }
    const float shrink = online_softmax_row(terms, begin, end, x, head.reference + row, head.sum + row);
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
  void store_result(int64_t index, const Parts* splits, int64_t split) const {
    const DecodeHead& head = heads[index];
    for (int64_t row = 0; row < rows; ++row) join_pairs<Element>(head.out + row * padded_hv, p.Hv);
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
      combine_parts(a, s, index, 0, rows, parts, row_scratch);
      return;
    }
    const Parts target = splits->rows_from(0, split);
    std::memcpy(target.references, references, rows * 8);
    std::memcpy(target.sums, sums, rows * 8);
    std::memcpy(target.out, head.out, rows * padded_hv * 4);
  }
};

// The values [begin, end) of one sequence, what is not finite as 0, in `copy`, to be read in place of v.
template <class Element>
static AttentionTensor copy_finite(const AttentionProblem& p, const Sequence& s, int64_t begin, int64_t end,
                                   Element* copy) {
  const int64_t stride = p.G * p.Hv;
  Element* to = copy;
  for (int64_t key = begin; key < end; ++key) {
    for (int64_t head = 0; head < p.G; ++head) {
      const Element* v = rows_of(p.v, s.batch, s.k_begin, head, 1).template row<Element>(key);
      for (int64_t i = 0; i < p.Hv; ++i) *to++ = to_float(v[i]) * 0.0f == 0.0f ? v[i] : Element{};
    }
  }
  return {copy - (s.k_begin + begin) * stride, 0, stride, p.Hv, 1, p.v.dtype};
}

// One split of a sequence's keys; `splits`: the first head's, in the caller's memory. Values are read where
// they lie, so whether something in them should have been 0 shows in the sums, which are then made once more.
template <class Element>
static void decode_as(const AttentionForward& a, const Sequence& s, const ForwardShape& shape, int64_t split,
                      const Parts& splits, bool cleansed = false) {
  const Range keys = keys_seen(s, 0, s.T - 1);
  const int64_t first = (shape.first_split + split) * shape.keys_per_split;
  const int64_t begin = larger(keys.begin, first), end = smaller(keys.end, first + shape.keys_per_split);
  Decoder<Element> decoder(a, s, shape.rows);
  decoder.run(begin, end);
  if (!cleansed && decoder.may_have_leaked()) {
    note_left_out(a.left_out);
    // Not a std::unique_ptr, whose code the linker would share with other instruction sets.
    auto* const copy = new Element[(end - begin) * a.problem.G * a.problem.Hv];
    AttentionForward finite = a;
    finite.problem.v = copy_finite(a.problem, s, begin, end, copy);
    decode_as<Element>(finite, s, shape, split, splits, true);
    delete[] copy;
    return;
  }
  for (int64_t head = 0; head < a.problem.G; ++head) {
    const Parts of_head = splits.of_head(head);
    decoder.store_result(head, shape.num_splits > 1 ? &of_head : nullptr, split);
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
