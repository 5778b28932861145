// Which attention runs with bf16 or fp16 products, and the memory that it needs: the same for every
// instruction set.
#pragma once

#include "attention/cpu/tile_scheduler.h"

namespace pypar {
namespace half {

// Whether a problem runs with products of its own 16-bit type where the CPU has them. Not with what changes
// single scores, and not with few rows, for which packing the keys costs more than it spares.
static inline bool suits(const AttentionProblem& p) {
  const bool plain = p.softcap == 0.0f && !p.bias.data && !p.alibi_slopes && p.dropout_p == 0.0f;
  const int64_t sequences = p.cu_seqlens_q ? p.B : 1;
  return p.q.dtype != kFloat32 && plain && p.T * (p.N / p.G) > kDecodeRows * sequences;
}

// Rows of one part, in panels of 32.
constexpr int64_t kForwardRows = 64;

// Packed keys of one head come in blocks of 32, those of one sequence after those of another. A sequence
// begins with a block of its own; with cumulative lengths, where its first key would be, one block further
// for each sequence before.
static inline int64_t total_key_blocks(const AttentionProblem& p) {
  return p.cu_seqlens_k ? p.S / 32 + p.B + 1 : p.B * blocks_of(p.S, 32);
}
static inline int64_t first_key_block(const AttentionProblem& p, const Sequence& s) {
  return p.cu_seqlens_k ? s.k_begin / 32 + s.batch : s.batch * blocks_of(p.S, 32);
}

struct ForwardMemory {
  int64_t total_blocks;
  int64_t* first_part;  // per sequence
  void *k, *v;          // per head and block

  ForwardMemory(const AttentionProblem& p, void* memory) : total_blocks(total_key_blocks(p)) {
    auto* start = static_cast<char*>(memory);
    first_part = reinterpret_cast<int64_t*>(start);
    k = start + index_bytes(p);
    v = static_cast<char*>(k) + p.G * total_blocks * 32 * blocks_of(p.H, 32) * 64;
  }
  static int64_t bytes(const AttentionProblem& p) {
    return index_bytes(p) + p.G * total_key_blocks(p) * 32 * (blocks_of(p.H, 32) + blocks_of(p.Hv, 32)) * 64;
  }
  // The sequence whose region contains the block.
  static int64_t sequence_of_block(const AttentionProblem& p, int64_t block) {
    if (!p.cu_seqlens_k) return block / blocks_of(p.S, 32);
    int64_t low = 0, high = p.B - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (p.cu_seqlens_k[middle] / 32 + middle <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// ---- backward

// Rows and keys of one step.
constexpr int64_t kBackwardRows = 64;
constexpr int64_t kBackwardKeys = 128;

// Over a block of rows the largest sum of a row's |dout|, and the largest |delta|.
struct RowBounds {
  float dout, delta;
};

// What one block of rows has in the caller's memory, in bytes from its begin.
struct RowBlockLayout {
  // q and dout as right operands, transposed and not; the reference and delta of each row; RowBounds; the sum
  // of dq^T.
  int64_t q_transposed, q, dout_transposed, dout, base, delta, bounds, dq, bytes;

  explicit RowBlockLayout(const AttentionProblem& p) {
    const int64_t h = blocks_of(p.H, 32) * 32 * kBackwardRows, hv = blocks_of(p.Hv, 32) * 32 * kBackwardRows;
    q_transposed = 0;
    q = q_transposed + h * 2;
    dout_transposed = q + h * 2;
    dout = dout_transposed + hv * 2;
    base = dout + hv * 2;
    delta = base + kBackwardRows * 4;
    bounds = delta + kBackwardRows * 4;
    dq = bounds + 64;
    bytes = dq + h * 4;
  }
};

static inline int64_t backward_row_blocks(const AttentionProblem& p, const Sequence& s) {
  return blocks_of(s.T * (p.N / p.G), kBackwardRows);
}

// Long sequences are gone through in several chunks of rows, each against all keys: the operands made of a
// head's rows then stay near the core, and need little memory.
constexpr int64_t kChunkBytes = 3 << 20;

// How the blocks of rows of each sequence and head are divided.
struct Chunks {
  int64_t count, num_blocks;  // of one chunk

  explicit Chunks(const AttentionProblem& p) {
    int64_t most = 1;
    for (int64_t i = 0; i < count_sequences(p); ++i)
      most = most_of(most, backward_row_blocks(p, sequence_of(p, i)));
    count = blocks_of(most, most_of(1, kChunkBytes / RowBlockLayout(p).bytes));
    num_blocks = blocks_of(most, count);
  }
  Range blocks(const AttentionProblem& p, const Sequence& s, int64_t chunk) const {
    const int64_t all = backward_row_blocks(p, s);
    return {least_of(all, chunk * num_blocks), least_of(all, (chunk + 1) * num_blocks)};
  }
  // The chunks whose rows see some of the keys [first, last]; the first one if none does.
  Range seeing(const AttentionProblem& p, const Sequence& s, int64_t first, int64_t last) const {
    const Range queries = queries_seeing(s, first, last);
    if (queries.begin == queries.end) return {0, 1};
    const int64_t rows = num_blocks * kBackwardRows, group = p.N / p.G;
    return {queries.begin * group / rows, (queries.end * group - 1) / rows + 1};
  }
};

// Per sequence and once more, where its blocks of rows of this chunk and its parts begin; the blocks of rows;
// with several chunks, the sums of dk and dv of each part, unless they are added to the results at once; for
// each block of rows which block of keys its dq takes next.
struct BackwardMemory {
  int64_t* first_row_block;
  int64_t* first_part;
  int64_t num_row_blocks, num_parts;
  char* row_blocks;
  float* sums;
  int32_t* progress;
  float* gradient_scales;  // per sequence and head

  static int64_t part_floats(const AttentionProblem& p) {
    return kBackwardKeys * 32 * (blocks_of(p.H, 32) + blocks_of(p.Hv, 32));
  }
  static bool keeps_sums(const Chunks& chunks, bool accumulate) { return chunks.count > 1 && !accumulate; }
  static int64_t bytes(const AttentionProblem& p, bool accumulate) {
    const Chunks chunks(p);
    int64_t rows = 0, parts = 0;
    for (int64_t i = 0; i < count_sequences(p); ++i) {
      const Sequence s = sequence_of(p, i);
      rows += chunks.blocks(p, s, 0).end * p.G;
      parts += blocks_of(s.S, kBackwardKeys) * p.G;
    }
    return index_bytes(p) + rows * (RowBlockLayout(p).bytes + 4) + count_sequences(p) * p.G * 4 +
           (keeps_sums(chunks, accumulate) ? parts * part_floats(p) * 4 : 0);
  }
  BackwardMemory(const AttentionBackward& a, const Chunks& chunks, int64_t chunk)
      : num_row_blocks(0), num_parts(0) {
    const AttentionProblem& p = a.problem;
    first_row_block = static_cast<int64_t*>(a.memory);
    first_part = first_row_block + count_sequences(p) + 1;
    int64_t most_row_blocks = 0;
    for (int64_t i = 0; i < count_sequences(p); ++i) {
      const Sequence s = sequence_of(p, i);
      const Range blocks = chunks.blocks(p, s, chunk);
      first_row_block[i] = num_row_blocks;
      first_part[i] = num_parts;
      num_row_blocks += (blocks.end - blocks.begin) * p.G;
      most_row_blocks += chunks.blocks(p, s, 0).end * p.G;
      num_parts += blocks_of(s.S, kBackwardKeys) * p.G;
    }
    row_blocks = static_cast<char*>(a.memory) + index_bytes(p);
    sums = reinterpret_cast<float*>(row_blocks + most_row_blocks * RowBlockLayout(p).bytes);
    const int64_t num_sums = keeps_sums(chunks, a.accumulate) ? num_parts * part_floats(p) : 0;
    progress = reinterpret_cast<int32_t*>(sums + num_sums);
    gradient_scales = reinterpret_cast<float*>(progress + most_row_blocks);
  }
};

// The memory of both ways, of which the instruction set takes one.
static inline int64_t forward_bytes(const AttentionProblem& p) {
  return most_of(attention_forward_bytes(p), suits(p) ? ForwardMemory::bytes(p) : 0);
}
static inline int64_t backward_bytes(const AttentionProblem& p, bool accumulate) {
  return most_of(attention_backward_bytes(p), suits(p) ? BackwardMemory::bytes(p, accumulate) : 0);
}

}  // namespace half
}  // namespace pypar
