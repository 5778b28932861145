// Attention, forward: online softmax over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867; Dao,
// arXiv 2307.08691), in base 2.
//
// Scores are computed transposed, scores[key][row] = K Q^T, so that lanes are query rows: the softmax over
// keys needs no reduction across lanes, and the operand that must be transposed, Q, is the one that stays for
// the whole task.
#include "attention/arguments.h"

namespace pypar {
PYPAR_KERNEL(attention_forward, AttentionForward)
}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "attention/cpu/combine.h"
#  include "attention/cpu/decode.h"
#  if defined(__AVX512BF16__)
#    include "attention/cpu/half/forward.h"
#  endif
#  include "attention/cpu/fp32.h"
#  include "attention/cpu/online_softmax.h"
#  include "attention/cpu/scores.h"
#  include "core/parallel.h"

namespace pypar::PYPAR_ISA {
namespace {

// Query blocks that share the packed keys and values of one task, at most. Results do not depend on it.
constexpr int64_t kBlocksPerTask = 4;
// One task's memory: one block of rows takes block_bytes, what stands before them is used by all.
template <class Arithmetic>
struct Layout {
  int64_t scores, bias, keys, values, scratch, rescale, staging, row, blocks;
  int64_t out_bytes, block_bytes, total;

  Layout(const Arithmetic& m, int64_t Hv, bool has_bias) {
    constexpr int64_t kSquare = kBlock * kBlock * 4, kRow = kBlock * 4;
    scores = 0;
    bias = scores + kSquare;
    keys = bias + (has_bias ? 2 * kSquare : 0);
    values = keys + m.keys_bytes();
    scratch = values + m.values_bytes();
    rescale = scratch + m.scratch_bytes();
    staging = rescale + kRow;
    row = staging + kBlock * padded_size(Hv) * 4;
    blocks = row + padded_size(Hv) * 4;
    out_bytes = larger(m.out_bytes(), kBlock * padded_size(Hv) * 4);
    block_bytes = m.queries_bytes() + 2 * out_bytes + 14 * kRow;
    total = blocks + kBlocksPerTask * block_bytes;
  }
};

// scores[key][row]: products -> scores. `bias` [key][kBlock]: null without.
void final_scores(const AttentionProblem& p, const RowBlock& block, float* scores, const float* bias,
                  int64_t first_key, int64_t num_keys) {
  const auto step = static_cast<int32_t>(p.step);
  for (int64_t row = 0; row < block.count; row += kWidth) {
    const Range keys = Seen(block, row, first_key, num_keys).some;
    Int apart{};
    for (int i = 0; i < kWidth; ++i) apart[i] = near(block.apart[row + i] - p.step * first_key);
    const Float slope = load(block.slope + row);
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      float* x = scores + key * kBlock + row;
      Float capped = zero();
      const Float added = bias ? load(bias + key * kBlock + row) : zero();
      store(x, final_score(p, load(x), added, slope, apart - static_cast<int32_t>(key) * step, &capped));
    }
  }
}

// p[key][row] *= keep or 0.
void drop(const AttentionProblem& p, const Sequence& s, const ScoreTerms& terms, const RowBlock& block,
          float* scores, int64_t first_key, int64_t num_keys) {
  for (int64_t row = 0; row < block.count; row += kWidth) {
    const Range keys = Seen(block, row, first_key, num_keys).some;
    UInt position, stream;
    std::memcpy(&position, block.position + row, sizeof(position));
    std::memcpy(&stream, block.stream + row, sizeof(stream));
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      float* x = scores + key * kBlock + row;
      const UInt at = broadcast_uint(static_cast<uint32_t>(s.k_start + p.step * (first_key + key)));
      store(x, load(x) * kept(at, position, stream, p.dropout_threshold, terms.keep));
    }
  }
}

// What the mask leaves of the two products of a block of rows and a block of keys.
struct Trim {
  Range rows[kGroups];  // per group of keys, in vectors
  Range keys[kGroups];  // per group of rows

  Trim(const RowBlock& block, int64_t first_key, int64_t num_keys) {
    int64_t begin = 0, end = 0;
    for (int64_t key = 0; key < num_keys; key += kRows) {
      while (begin < block.count && block.end[begin] <= first_key + key) ++begin;
      while (end < block.count && block.begin[end] < first_key + key + kRows) ++end;
      rows[key / kRows] = {begin / kWidth, (end + kWidth - 1) / kWidth};
    }
    for (int64_t row = 0; row < block.count; row += kRows) {
      const int64_t last = smaller(row + kRows, block.count) - 1;
      const int64_t from = larger(0, block.begin[row] - first_key);
      keys[row / kRows] = {from, larger(from, smaller(num_keys, block.end[last] - first_key))};
    }
  }
};

// Consecutive query blocks of one key/value head against the keys that they see, or one split of these.
template <class Arithmetic>
struct Task {
  const AttentionForward& a;
  const AttentionProblem& p;
  const Sequence s;
  const ForwardShape shape;
  const int64_t head, group;
  const Arithmetic m;
  const ScoreTerms terms;
  const Layout<Arithmetic> layout;
  char* const memory;
  int64_t num_blocks;
  RowBlock blocks[kBlocksPerTask];
  Parts earlier[kBlocksPerTask];  // per block, the sums of earlier splits; count 0: none
  float* spare[kBlocksPerTask];   // room for one more out

  Task(const AttentionForward& arguments, const Sequence& sequence, const ForwardShape& of, int64_t key_head)
      : a(arguments),
        p(arguments.problem),
        s(sequence),
        shape(of),
        head(key_head),
        group(p.N / p.G),
        m(p),
        terms(score_terms(p)),
        layout(m, p.Hv, p.bias.data != nullptr),
        memory(static_cast<char*>(thread_scratch(layout.total))),
        num_blocks(0) {}

  float* floats(int64_t offset) const { return reinterpret_cast<float*>(memory + offset); }

  void begin_block(int64_t first) {
    RowBlock& block = blocks[num_blocks];
    char* at = memory + layout.blocks + num_blocks * layout.block_bytes;
    block.queries = at;
    block.out = at + m.queries_bytes();
    spare[num_blocks] = reinterpret_cast<float*>(at + m.queries_bytes() + layout.out_bytes);
    at += m.queries_bytes() + 2 * layout.out_bytes;
    block.reference = reinterpret_cast<float*>(at);
    block.sum = block.reference + kBlock;
    block.excess = block.sum + kBlock;
    block.begin = reinterpret_cast<int32_t*>(block.excess + kBlock);
    block.end = block.begin + kBlock;
    block.slope = reinterpret_cast<float*>(block.end + kBlock);
    block.position = reinterpret_cast<uint32_t*>(block.slope + kBlock);
    block.stream = block.position + kBlock;
    block.apart = reinterpret_cast<int64_t*>(block.stream + kBlock);
    char* const memory_of_sums = reinterpret_cast<char*>(block.apart + kBlock);
    earlier[num_blocks] = {memory_of_sums, memory_of_sums + kBlock * 8, nullptr, 0, 0, 0};
    ++num_blocks;
    block.first = first;
    block.count = smaller(kBlock, shape.rows - first);
    const Rows q = rows_of(p.q, s.batch, s.q_begin, head, group);
    m.pack_queries(q, first, block.count, terms.sign, block.queries, memory + layout.scratch);
    clear_block(block);
    block.keys = keys_seen(s, first / group, (first + block.count - 1) / group);
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t row = first + smaller(i, block.count - 1);
      const Range keys = keys_seen(s, row / group, row / group);
      block.begin[i] = static_cast<int32_t>(keys.begin);
      block.end[i] = static_cast<int32_t>(keys.end);
      if (!terms.general && !terms.dropout) continue;
      const RowTerms row_of = row_terms(p, terms, s, head, row);
      block.slope[i] = row_of.slope;
      block.position[i] = row_of.position;
      block.stream[i] = row_of.stream;
      block.apart[i] = row_of.apart;
    }
  }

  const float* transposed_bias(const RowBlock& block, int64_t first_key, int64_t num_keys) const {
    float* const packed = floats(layout.bias);
    float* const transposed = packed + kBlock * kBlock;
    pack(bias_rows(p, s.batch, head, first_key), block.first, block.count, num_keys, 1.0f, packed, kBlock);
    transpose(packed, kBlock, block.count, num_keys, transposed, kBlock);
    return transposed;
  }

  // What is summed so far goes to the sums of earlier splits. Many rows are not split among tasks, but their
  // sums are: the bits of a row do not depend on how many there are.
  void combine_block(int64_t index) {
    RowBlock& block = blocks[index];
    Parts& sums = earlier[index];
    int64_t stride = padded_size(p.Hv);
    if (sums.count == 0) {
      float* out = const_cast<float*>(m.read_out(block.out, block.count, spare[index], &stride));
      if (out != spare[index]) block.out = spare[index];
      sums = {sums.references, sums.sums, reinterpret_cast<char*>(out), stride, 1, 0};
      find_sums(block, reinterpret_cast<double*>(sums.references), reinterpret_cast<double*>(sums.sums));
      return;
    }
    double reference[kBlock], sum[kBlock];
    find_sums(block, reference, sum);
    const float* out = m.read_out(block.out, block.count, floats(layout.staging), &stride);
    for (int64_t row = 0; row < block.count; ++row)
      combine_row(sums, row, reference[row], sum[row], out + row * stride, round_up(p.Hv, kWidth));
  }

  void find_sums(const RowBlock& block, double* reference, double* sum) const {
    for (int64_t row = 0; row < block.count; ++row) {
      reference[row] = static_cast<double>(block.reference[row]) * terms.unit;
      sum[row] = static_cast<double>(block.sum[row]) - block.excess[row];
    }
  }

  void clear_block(RowBlock& block) const {
    for (int64_t i = 0; i < kBlock; ++i) {
      block.reference[i] = -__builtin_inff();
      block.sum[i] = block.excess[i] = 0.0f;
    }
    m.clear_out(block.out);
  }

  // One block of keys against one block of rows.
  void attend(const RowBlock& block, int64_t first_key, int64_t num_keys) const {
    float *const scores = floats(layout.scores), *const rescale = floats(layout.rescale);
    const bool masked = block.begin[block.count - 1] > first_key || block.end[0] < first_key + num_keys;
    const Trim trim(block, first_key, masked ? num_keys : 0);
    m.scores(block.queries, block.count, memory + layout.keys, num_keys, masked ? trim.rows : nullptr,
             scores);
    if (terms.general) {
      const float* bias = p.bias.data ? transposed_bias(block, first_key, num_keys) : nullptr;
      final_scores(p, block, scores, bias, first_key, num_keys);
    }
    const bool any_rescale = online_softmax(block, terms, scores, first_key, num_keys, rescale);
    if (terms.dropout) drop(p, s, terms, block, scores, first_key, num_keys);
    if ((masked || terms.hides) && m.cleanse_values(memory + layout.values, num_keys))
      note_left_out(a.left_out);
    m.add_out(scores, block.count, memory + layout.values, num_keys, masked ? trim.keys : nullptr,
              any_rescale ? rescale : nullptr, block.out, memory + layout.scratch);
  }

  void run(int64_t first_block, int64_t count, int64_t split) {
    for (int64_t i = 0; i < count; ++i) begin_block((first_block + i) * kBlock);
    const int64_t split_begin = (shape.first_split + split) * shape.keys_per_split;
    const int64_t end = smaller(blocks[count - 1].keys.end, split_begin + shape.keys_per_split);
    const Rows k = rows_of(p.k, s.batch, s.k_begin, head, 1), v = rows_of(p.v, s.batch, s.k_begin, head, 1);
    int64_t first_key = larger(split_begin, blocks[0].keys.begin / kBlock * kBlock);
    for (; first_key < end; first_key += kBlock) {
      const int64_t num_keys = smaller(kBlock, end - first_key);
      m.pack_keys(k, first_key, num_keys, memory + layout.keys, memory + layout.scratch);
      m.pack_values(v, first_key, num_keys, memory + layout.values, memory + layout.scratch);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t num_seen = smaller(num_keys, blocks[i].keys.end - first_key);
        if (num_seen <= 0 || blocks[i].keys.begin >= first_key + num_keys) continue;
        if (first_key % kKeysPerSplit == 0 && first_key > larger(split_begin, blocks[i].keys.begin)) {
          combine_block(i);
          clear_block(blocks[i]);
        }
        attend(blocks[i], first_key, num_seen);
      }
    }
  }

  // To out and lse, or, as one of several splits, to `splits`.
  void store_result(const Parts* splits, int64_t split) {
    for (int64_t i = 0; i < num_blocks; ++i) {
      const RowBlock& block = blocks[i];
      if (earlier[i].count > 0) {
        combine_block(i);
        combine_parts(a, s, head, block.first, block.count, earlier[i], floats(layout.row));
        continue;
      }
      double reference[kBlock], sum[kBlock];
      find_sums(block, reference, sum);
      int64_t stride = padded_size(p.Hv);
      const float* out = m.read_out(block.out, block.count, floats(layout.staging), &stride);
      if (!splits) {
        const Parts parts{reinterpret_cast<char*>(reference),
                          reinterpret_cast<char*>(sum),
                          reinterpret_cast<char*>(const_cast<float*>(out)),
                          stride,
                          1,
                          0};
        combine_parts(a, s, head, block.first, block.count, parts, floats(layout.row));
        continue;
      }
      const Parts target = splits->rows_from(block.first, split);
      std::memcpy(target.references, reference, block.count * 8);
      std::memcpy(target.sums, sum, block.count * 8);
      for (int64_t row = 0; row < block.count; ++row) {
        std::memcpy(target.out + row * target.stride * 4, out + row * stride, round_up(p.Hv, kWidth) * 4);
      }
    }
  }
};

// ---- the parts of a call

struct TileScheduler {
  const AttentionForward& a;
  int64_t num_sequences, blocks_per_task;
  int64_t *tasks, *splits;  // per sequence, and once more: where its tasks begin, and its splits in memory

  explicit TileScheduler(const AttentionForward& arguments) : a(arguments) {
    const AttentionProblem& p = a.problem;
    num_sequences = count_sequences(p);
    tasks = static_cast<int64_t*>(a.memory);
    splits = tasks + num_sequences + 1;
    int64_t blocks = 0;
    for (int64_t i = 0; i < num_sequences; ++i) {
      const ForwardShape shape = forward_shape(p, sequence_of(p, i));
      if (!shape.decode) blocks += p.G * shape.row_blocks * shape.num_splits;
    }
    // Some tasks per thread, so that the threads end together.
    blocks_per_task = larger(1, smaller(kBlocksPerTask, blocks / (4 * larger(1, p.num_threads))));
    tasks[0] = 0;
    splits[0] = index_bytes(p);
    for (int64_t i = 0; i < num_sequences; ++i) {
      const ForwardShape shape = forward_shape(p, sequence_of(p, i));
      // Decoding takes all heads together.
      const int64_t heads = shape.decode ? 1 : p.G;
      tasks[i + 1] = tasks[i] + heads * tasks_per_split(shape) * shape.num_splits;
      splits[i + 1] = splits[i] + splits_bytes(p, shape);
    }
  }

  int64_t tasks_per_split(const ForwardShape& shape) const {
    return shape.decode ? smaller(shape.rows, 1) : blocks_of(shape.row_blocks, blocks_per_task);
  }

  Parts parts_of(int64_t sequence, const ForwardShape& shape, int64_t head) const {
    char* memory = static_cast<char*>(a.memory) + splits[sequence];
    return split_parts(a.problem, shape, memory + head * shape.num_splits * split_bytes(a.problem, shape));
  }
};

template <class Arithmetic>
void run_task(const TileScheduler& scheduler, int64_t index) {
  const AttentionProblem& p = scheduler.a.problem;
  const int64_t sequence = find_entry(scheduler.tasks, scheduler.num_sequences, index);
  const Sequence s = sequence_of(p, sequence);
  const ForwardShape shape = forward_shape(p, s);
  const int64_t per_split = scheduler.tasks_per_split(shape), per_head = per_split * shape.num_splits;
  const int64_t in_sequence = index - scheduler.tasks[sequence];
  const int64_t head = in_sequence / per_head, split = in_sequence % per_head / per_split;
  const Parts parts = scheduler.parts_of(sequence, shape, head);
  const Parts* splits = shape.num_splits > 1 ? &parts : nullptr;
  if (shape.decode) {
    decode(scheduler.a, s, shape, split, scheduler.parts_of(sequence, shape, 0));
    return;
  }
  Task<Arithmetic> task(scheduler.a, s, shape, head);
  // The last rows see the most keys: they come first, so that no thread ends with a long task alone.
  const int64_t first = (per_split - 1 - in_sequence % per_split) * scheduler.blocks_per_task;
  task.run(first, smaller(scheduler.blocks_per_task, shape.row_blocks - first), split);
  task.store_result(splits, split);
}

void combine_splits(const TileScheduler& scheduler, int64_t sequence, int64_t head) {
  const AttentionProblem& p = scheduler.a.problem;
  if (scheduler.splits[sequence] == scheduler.splits[sequence + 1]) return;
  const Sequence s = sequence_of(p, sequence);
  const ForwardShape shape = forward_shape(p, s);
  auto* scratch = static_cast<float*>(thread_scratch(padded_size(p.Hv) * 4));
  const Parts parts = scheduler.parts_of(sequence, shape, head);
  if (shape.decode) {
    combine_parts(scheduler.a, s, head, 0, shape.rows, parts, scratch);
    return;
  }
  // One after the other, as a task does that has them all.
  const Parts sums = parts.rows_from(0, 0);
  for (int64_t split = 1; split < parts.count; ++split) {
    for (int64_t row = 0; row < shape.rows; ++row) {
      combine_row(sums, row, parts.reference(split, row), parts.sum(split, row), parts.row(split, row),
                  round_up(p.Hv, kWidth));
    }
  }
  combine_parts(scheduler.a, s, head, 0, shape.rows, sums, scratch);
}

template <class Arithmetic>
void run_forward(const AttentionForward& a) {
  const TileScheduler scheduler(a);
  const int64_t heads = scheduler.num_sequences * a.problem.G;
  parallel_for(scheduler.tasks[scheduler.num_sequences], 1, a.problem.num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) run_task<Arithmetic>(scheduler, i);
               });
  if (scheduler.splits[0] == scheduler.splits[scheduler.num_sequences]) return;
  parallel_for(heads, 1, a.problem.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) combine_splits(scheduler, i / a.problem.G, i % a.problem.G);
  });
}

}  // namespace

void attention_forward(const AttentionForward& a) {
#  if defined(__AVX512BF16__)
  if (half::takes(a)) return half::attention_forward(a);
#  endif
  run_forward<Fp32Arithmetic>(a);
}

}  // namespace pypar::PYPAR_ISA

#else

#  include "attention/binding.h"
#  include "attention/cpu/half/tile_scheduler.h"
#  include "attention/cpu/nonfinite.h"

PYPAR_BIND(attention_forward) {
  pypar::bind_attention_forward(
      module, pypar::check_attention_lengths, pypar::half::forward_bytes,
      pypar::launch_with_unseen<pypar::attention_forward_kernels, pypar::AttentionForward>);
}

#endif
