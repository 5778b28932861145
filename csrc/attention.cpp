// Attention, forward: online softmax over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867; Dao,
// arXiv 2307.08691), in base 2.
//
// Scores are computed transposed, scores[key][row] = K Q^T, so that lanes are query rows: the softmax over
// keys needs no reduction across lanes, and the operand that must be transposed, Q, is the one that stays for
// the whole task.
#include "attention.h"

namespace pypar {
PYPAR_KERNEL(attention_forward, AttentionForward)
}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "attention_tile.h"
#  include "parallel.h"

namespace pypar::PYPAR_ISA {
namespace {

// Query blocks that share the packed keys and values of one task, at most. Results do not depend on it.
constexpr int64_t kBlocksPerTask = 4;
// A row's reference value, subtracted from its scores, follows the row's maximum only when that has grown by
// more than this (in powers of two), which spares most rescaling. Sums stay below 2^8 times what they would
// be.
constexpr float kSlack = 8.0f;

// The state of one block of query rows.
struct QueryBlock {
  float* q_transposed;   // [H][kBlock], negated for a negative scale
  float* out;            // [kBlock][padded Hv], not yet normalised
  float* reference;      // [kBlock], what is subtracted from a row's scores
  float* sum;            // [kBlock], of 2^((score - reference) * factor)
  int32_t* limit;        // [kBlock], the last key that a row sees
  int64_t first, count;  // rows
  int64_t num_keys;      // that any of its rows sees
};

struct Layout {
  int64_t padded_h, padded_hv;

  explicit Layout(const AttentionProblem& s)
      : padded_h(round_up(s.H, kWidth)), padded_hv(round_up(s.Hv, kWidth)) {}

  int64_t block_floats() const { return kBlock * (padded_h + padded_hv + 3); }
  int64_t total_floats() const {
    return kBlocksPerTask * block_floats() + kBlock * (padded_h + padded_hv) + kBlock * kBlock + kBlock;
  }
};

// scores[key][row] -> 2^((score - reference) * factor), for keys [0, num_keys) of one block, and the rows'
// new references and sums. Unseen scores become 0. `rescale` [kBlock] receives by how much the rows' output
// must be multiplied; false if by nothing.
template <bool kMasked>
bool soften(QueryBlock& block, float factor, float* scores, int64_t first_key, int64_t num_keys,
            float* rescale) {
  bool any_rescale = false;
  const float slack = factor > 1e-30f ? kSlack / factor : kSlack * 1e30f;
  const float least = factor > 1e-30f ? -200.0f / factor : -200.0f * 1e30f;
  for (int64_t row = 0; row < block.count; row += kWidth) {
    float* column = scores + row;
    Int limit{};
    int64_t end = num_keys;
    if (kMasked) {
      std::memcpy(&limit, block.limit + row, sizeof(limit));
      const int64_t last_row = smaller(row + kWidth, block.count) - 1;
      end = larger(0, smaller(num_keys, block.limit[last_row] - first_key + 1));
    }
    const Float lowest = broadcast(-__builtin_inff());
    Float top[2] = {lowest, lowest};
    int64_t key = 0;
    if (!kMasked) {
      for (; key + 2 <= end; key += 2) {
        top[0] = max(top[0], load(column + key * kBlock));
        top[1] = max(top[1], load(column + (key + 1) * kBlock));
      }
    }
    for (; key < end; ++key) {
      const Float score = load(column + key * kBlock);
      const Int seen = limit >= broadcast_int(static_cast<int32_t>(first_key + key));
      top[0] = max(top[0], kMasked ? select(seen, score, lowest) : score);
    }
    top[0] = max(top[0], top[1]);
    const Float old = load(block.reference + row);
    const Int grown = top[0] > old + slack;
    Float reference = old, sum = load(block.sum + row), shrink = broadcast(1.0f);
    if (any(grown)) {
      reference = select(grown, top[0], old);
      shrink = select(grown & (old > lowest), exp2_of_product(old - reference, factor, least), shrink);
      sum *= shrink;
      any_rescale = true;
      store(block.reference + row, reference);
    }
    store(rescale + row, shrink);
    Float sums[2] = {zero(), zero()};
    key = 0;
    if (!kMasked) {
      for (; key + 2 <= end; key += 2) {
        const Float p0 = exp2_of_product(load(column + key * kBlock) - reference, factor, least);
        const Float p1 = exp2_of_product(load(column + (key + 1) * kBlock) - reference, factor, least);
        store(column + key * kBlock, p0);
        store(column + (key + 1) * kBlock, p1);
        sums[0] += p0;
        sums[1] += p1;
      }
    }
    for (; key < end; ++key) {
      Float p = exp2_of_product(load(column + key * kBlock) - reference, factor, least);
      if (kMasked) {
        const Int seen = limit >= broadcast_int(static_cast<int32_t>(first_key + key));
        p = select(seen, p, zero());
      }
      store(column + key * kBlock, p);
      sums[key & 1] += p;
    }
    for (; key < num_keys; ++key) store(column + key * kBlock, zero());
    store(block.sum + row, sum + (sums[0] + sums[1]));
  }
  return any_rescale;
}

void rescale_out(QueryBlock& block, const float* rescale, int64_t padded_hv) {
  for (int64_t row = 0; row < block.count; ++row) {
    if (rescale[row] == 1.0f) continue;
    float* out = block.out + row * padded_hv;
    for (int64_t i = 0; i < padded_hv; i += kWidth) store(out + i, load(out + i) * rescale[row]);
  }
}

// One block of keys against one block of rows.
void attend(const AttentionProblem& s, const Layout& layout, QueryBlock& block, const float* k,
            const float* v, int64_t first_key, int64_t num_keys, float* scores, float* rescale) {
  const int64_t num_vecs = (block.count + kWidth - 1) / kWidth;
  const bool masked = block.limit[0] < first_key + num_keys - 1;
  Range columns[kGroups], depth[kGroups];
  if (masked) {
    int64_t row = 0;
    for (int64_t key = 0; key < num_keys; key += kRows) {
      while (row < block.count && block.limit[row] < first_key + key) ++row;
      columns[key / kRows] = {row / kWidth, num_vecs};
    }
    for (row = 0; row < block.count; row += kRows) {
      const int64_t last = block.limit[smaller(row + kRows, block.count) - 1];
      depth[row / kRows] = {0, larger(0, smaller(num_keys, last - first_key + 1))};
    }
  }
  multiply<false, false>(num_keys, num_vecs, s.H, k, layout.padded_h, block.q_transposed, kBlock, scores,
                         kBlock, masked ? columns : nullptr, nullptr);
  const bool any_rescale = masked
                               ? soften<true>(block, score_factor(s), scores, first_key, num_keys, rescale)
                               : soften<false>(block, score_factor(s), scores, first_key, num_keys, rescale);
  if (any_rescale) rescale_out(block, rescale, layout.padded_hv);
  multiply<true, true>(block.count, layout.padded_hv / kWidth, num_keys, scores, kBlock, v, layout.padded_hv,
                       block.out, layout.padded_hv, nullptr, masked ? depth : nullptr);
}

void begin_block(const AttentionForward& a, const Layout& layout, const Rows& q, int64_t first, float* memory,
                 float* scratch, QueryBlock* block) {
  const AttentionProblem& s = a.problem;
  const int64_t group = s.N / s.G;
  block->q_transposed = memory;
  block->out = block->q_transposed + kBlock * layout.padded_h;
  block->reference = block->out + kBlock * layout.padded_hv;
  block->sum = block->reference + kBlock;
  block->limit = reinterpret_cast<int32_t*>(block->sum + kBlock);
  block->first = first;
  block->count = smaller(kBlock, s.T * group - first);
  pack(q, first, block->count, s.H, score_sign(s), scratch, layout.padded_h);
  transpose(scratch, layout.padded_h, block->count, layout.padded_h, block->q_transposed, kBlock);
  for (int64_t i = 0; i < kBlock * layout.padded_hv; i += kWidth) store(block->out + i, zero());
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = first + smaller(i, block->count - 1);
    block->limit[i] = static_cast<int32_t>((s.right == 0) ? row / group + s.S - s.T : s.S - 1);
    block->reference[i] = -__builtin_inff();
    block->sum[i] = 0.0f;
  }
  block->num_keys = larger(0, block->limit[block->count - 1] + 1);
}

void end_block(const AttentionForward& a, const Layout& layout, const Rows& out, int64_t batch, int64_t head,
               QueryBlock& block) {
  const AttentionProblem& s = a.problem;
  const int64_t group = s.N / s.G;
  for (int64_t i = 0; i < block.count; ++i) {
    const float sum = block.sum[i];
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    float* row = block.out + i * layout.padded_hv;
    for (int64_t j = 0; j < layout.padded_hv; j += kWidth) store(row + j, load(row + j) * inverse);
    const int64_t r = block.first + i;
    a.lse[(batch * s.N + head * group + r % group) * s.T + r / group] =
        sum == 0.0f ? -__builtin_inff()
                    : static_cast<float>(static_cast<double>(block.reference[i]) * __builtin_fabsf(s.scale) +
                                         __builtin_log(sum));
  }
  unpack(block.out, layout.padded_hv, block.count, s.Hv, 1.0f, out, block.first);
}

// Consecutive query blocks of one key/value head against all keys that they see.
void run_task(const AttentionForward& a, int64_t batch, int64_t head, int64_t first_block,
              int64_t num_blocks) {
  const AttentionProblem& s = a.problem;
  const Layout layout(s);
  const int64_t group = s.N / s.G;
  auto* memory = static_cast<float*>(thread_scratch(layout.total_floats() * sizeof(float)));
  float* scores = memory;
  float* k = scores + kBlock * kBlock;
  float* v = k + kBlock * layout.padded_h;
  float* rescale = v + kBlock * layout.padded_hv;
  float* blocks_memory = rescale + kBlock;
  const Rows k_rows = rows_of(a.problem.k, batch, head, 1), v_rows = rows_of(a.problem.v, batch, head, 1);
  const Rows q_rows = rows_of(a.problem.q, batch, head, group), out_rows = rows_of(a.out, batch, head, group);
  QueryBlock blocks[kBlocksPerTask];
  for (int64_t i = 0; i < num_blocks; ++i) {
    begin_block(a, layout, q_rows, (first_block + i) * kBlock, blocks_memory + i * layout.block_floats(), k,
                &blocks[i]);
  }
  const int64_t end = blocks[num_blocks - 1].num_keys;
  for (int64_t first_key = 0; first_key < end; first_key += kBlock) {
    const int64_t num_keys = smaller(kBlock, s.S - first_key);
    pack(k_rows, first_key, num_keys, s.H, 1.0f, k, layout.padded_h);
    pack(v_rows, first_key, num_keys, s.Hv, 1.0f, v, layout.padded_hv);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t num_seen = smaller(num_keys, blocks[i].num_keys - first_key);
      if (num_seen > 0) attend(s, layout, blocks[i], k, v, first_key, num_seen, scores, rescale);
    }
  }
  for (int64_t i = 0; i < num_blocks; ++i) end_block(a, layout, out_rows, batch, head, blocks[i]);
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  const AttentionProblem& s = a.problem;
  const int64_t num_blocks = count_row_blocks(s);
  // Some tasks per thread, so that the threads end together.
  const int64_t wanted =
      larger(1, smaller(kBlocksPerTask, s.B * s.G * num_blocks / (4 * larger(1, s.num_threads))));
  const int64_t tasks_per_head = (num_blocks + wanted - 1) / wanted;
  parallel_for(s.B * s.G * tasks_per_head, 1, s.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tasks_per_head;
      // The last rows see the most keys: they come first, so that no thread ends with a long task alone.
      const int64_t first_block = (tasks_per_head - 1 - task % tasks_per_head) * wanted;
      run_task(a, head / s.G, head % s.G, first_block, smaller(wanted, num_blocks - first_block));
    }
  });
}

}  // namespace pypar::PYPAR_ISA

#else

#  include "attention_binding.h"

namespace {

void check(const pypar::AttentionProblem& p) {
  pypar::check_attention_lengths(p);
  const bool plain_mask = p.left == pypar::kUnbounded && p.right <= 0 && p.bottom_right;
  const bool plain_scores = p.softcap == 0 && !p.bias.data && !p.sinks && !p.alibi_slopes && p.dropout_p == 0;
  if (!plain_mask || !plain_scores || p.cu_seqlens_q) throw py::value_error("not there yet");
}

}  // namespace

PYPAR_BIND(attention_forward) {
  pypar::bind_attention_forward(
      module, check, [](const pypar::AttentionProblem&) { return int64_t{64}; },
      [](const pypar::AttentionForward& a) {
        if (a.carry) throw py::value_error("carry is not there yet");
        pypar::launch<pypar::attention_forward_kernels>(a);
      });
}

#endif
