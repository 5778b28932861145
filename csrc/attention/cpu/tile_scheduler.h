// Which parts of attention's work there are, and what memory they need: the same for every instruction set
// and any number of threads.
#pragma once

#include "attention/arguments.h"

namespace pypar {

// Query rows and keys are worked on in blocks of this many.
constexpr int64_t kBlock = 96;
// At most this many rows are computed straight from the keys and values in the caller's memory (decoding), if
// they see enough keys that this pays.
constexpr int64_t kDecodeRows = 16;
constexpr int64_t kDecodeKeys = 2 * kBlock;
// Few rows split the keys they see, so that all threads have work: at multiples of so many keys. The sums of
// many rows are combined there too, which costs the less the farther apart that is.
constexpr int64_t kFewBlocks = 4;
constexpr int64_t kKeysPerSplit = 16 * kBlock;
constexpr int64_t kDecodeKeysPerSplit = 2 * kBlock;
// No distance of two indices is as large.
constexpr int64_t kFar = int64_t{1} << 40;

struct Sequence {
  int64_t batch;
  int64_t T, S;
  int64_t q_begin, k_begin;  // where it begins in the tensors
  int64_t q_start, k_start;  // positions of its first query and key
  int64_t low, high;         // query t sees keys t + low .. t + high
};

static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

static inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// With cumulative lengths one more than there are: what lies behind the last one, whose rows see nothing.
static inline int64_t count_sequences(const AttentionProblem& p) { return p.B + (p.cu_seqlens_q ? 1 : 0); }

static inline Sequence sequence_of(const AttentionProblem& p, int64_t index) {
  Sequence s{index, p.T, p.S, 0, 0, p.q_start, p.k_start, -kFar, kFar};
  if (p.cu_seqlens_q) {
    s.q_begin = p.cu_seqlens_q[index];
    s.k_begin = p.cu_seqlens_k[index];
    s.T = (index < p.B ? p.cu_seqlens_q[index + 1] : p.T) - s.q_begin;
    s.S = (index < p.B ? p.cu_seqlens_k[index + 1] : p.S) - s.k_begin;
  }
  if (p.bottom_right) {
    s.q_start = s.S - s.T;
    s.k_start = 0;
  }
  const int64_t apart = s.q_start - s.k_start;
  if (p.left != kUnbounded) s.low = most_of(-kFar, -floor_divide(p.left - apart, p.step));
  if (p.right != kUnbounded) s.high = least_of(kFar, floor_divide(apart + p.right, p.step));
  if (index == p.B) {
    s.low = 1;
    s.high = 0;
  }
  return s;
}

// The keys that queries [first, last] see together: [begin, end), or begin == end.
struct Range {
  int64_t begin, end;
};

static inline Range keys_seen(const Sequence& s, int64_t first, int64_t last) {
  const int64_t begin = least_of(s.S, most_of(0, first + s.low));
  const int64_t end = s.high < s.low ? begin : most_of(begin, least_of(s.S, last + s.high + 1));
  return {begin, end};
}

// The queries that see one of the keys [first, last].
static inline Range queries_seeing(const Sequence& s, int64_t first, int64_t last) {
  const int64_t begin = least_of(s.T, most_of(0, first - s.high));
  const int64_t end = s.high < s.low ? begin : most_of(begin, least_of(s.T, last - s.low + 1));
  return {begin, end};
}

// ---- forward: parts are (key/value head, some blocks of rows, a split of the keys)

struct ForwardShape {
  int64_t rows, row_blocks;  // of one key/value head: its N / G query heads at each position, heads adjacent
  bool decode;
  int64_t keys_per_split, first_split, num_splits;
};

static inline ForwardShape forward_shape(const AttentionProblem& p, const Sequence& s) {
  ForwardShape shape{};
  shape.rows = s.T * (p.N / p.G);
  shape.row_blocks = blocks_of(shape.rows, kBlock);
  const Range keys = keys_seen(s, 0, s.T - 1);
  shape.decode = shape.rows <= kDecodeRows && keys.end - keys.begin >= kDecodeKeys &&
                 p.k.element_stride == 1 && p.v.element_stride == 1;
  shape.keys_per_split = shape.decode                     ? kDecodeKeysPerSplit
                         : shape.row_blocks <= kFewBlocks ? kKeysPerSplit
                                                          : most_of(1, s.S);
  shape.first_split = keys.begin / shape.keys_per_split;
  shape.num_splits = most_of(1, blocks_of(keys.end, shape.keys_per_split) - shape.first_split);
  return shape;
}

// What one split leaves for the rows of one key/value head: per row the reference and the sum, in fp64, then
// the output, not normalised.
static inline int64_t padded_size(int64_t size) { return blocks_of(size, 16) * 16; }
static inline int64_t split_bytes(const AttentionProblem& p, const ForwardShape& shape) {
  return blocks_of(shape.rows * (16 + 4 * padded_size(p.Hv)), 64) * 64;
}
static inline int64_t splits_bytes(const AttentionProblem& p, const ForwardShape& shape) {
  return shape.num_splits == 1 ? 0 : shape.num_splits * p.G * split_bytes(p, shape);
}

// The caller's memory: per sequence, and once more, where its parts begin; where its splits begin; the
// splits.
static inline int64_t index_bytes(const AttentionProblem& p) {
  return blocks_of((count_sequences(p) + 1) * 2 * 8, 64) * 64;
}
static inline int64_t attention_forward_bytes(const AttentionProblem& p) {
  int64_t bytes = index_bytes(p);
  for (int64_t i = 0; i < count_sequences(p); ++i) {
    const Sequence s = sequence_of(p, i);
    bytes += splits_bytes(p, forward_shape(p, s));
  }
  return bytes;
}

// ---- backward: parts are (key/value head, block of keys)

// Of one block of rows in the caller's memory: values per row, the sum of dq.
constexpr int64_t kRowValues = 4 * kBlock;
static inline int64_t row_block_floats(const AttentionProblem& p) {
  return kRowValues + kBlock * padded_size(p.H);
}

static inline int64_t count_row_blocks(const AttentionProblem& p, const Sequence& s) {
  return blocks_of(s.T * (p.N / p.G), kBlock);
}

// The caller's memory: per sequence, and once more, where its blocks of keys and its blocks of rows begin;
// the blocks of rows of all sequences and heads; for each of them how many blocks of keys its sum contains.
static inline int64_t attention_backward_bytes(const AttentionProblem& p) {
  int64_t row_blocks = 0;
  for (int64_t i = 0; i < count_sequences(p); ++i) row_blocks += count_row_blocks(p, sequence_of(p, i)) * p.G;
  return index_bytes(p) + row_blocks * (row_block_floats(p) * 4 + 4);
}

// In ascending `begins`, the last entry that is not above `index`.
static inline int64_t find_entry(const int64_t* begins, int64_t count, int64_t index) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (begins[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace pypar
