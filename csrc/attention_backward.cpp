// Attention, backward: five products per pair of blocks, scores recomputed from lse (Dao et al., arXiv
// 2205.14135).
//
// A task is one block of keys of one key/value head: it sums dk and dv over the query rows of the whole group
// of heads in its own memory and rounds them once. dq needs a sum over tasks. It is made in the order of the
// keys, each task waiting until its predecessor has passed a block of rows, so the result is the same for any
// number of threads; tasks start in that order too, so whoever waits, waits for a task that runs.
#include "attention.h"

namespace pypar {
PYPAR_KERNEL(attention_backward, AttentionBackward)
}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "attention_tile.h"
#  include "parallel.h"

namespace pypar::PYPAR_ISA {
namespace {

struct Scratch {
  float *k, *k_transposed, *v_transposed, *dk, *dv;  // of the task's keys
  float *q, *dout;                                   // of one block of rows
  float *p, *ds;                                     // [row][key]
  int64_t padded_h, padded_hv;

  Scratch(const AttentionProblem& s) : padded_h(round_up(s.H, kWidth)), padded_hv(round_up(s.Hv, kWidth)) {
    const int64_t total = kBlock * (4 * padded_h + 3 * padded_hv + 2 * kBlock);
    k = static_cast<float*>(thread_scratch(total * sizeof(float)));
    k_transposed = k + kBlock * padded_h;
    dk = k_transposed + kBlock * padded_h;
    q = dk + kBlock * padded_h;
    v_transposed = q + kBlock * padded_h;
    dv = v_transposed + kBlock * padded_hv;
    dout = dv + kBlock * padded_hv;
    p = dout + kBlock * padded_hv;
    ds = p + kBlock * kBlock;
  }
};

// What `prepare_row_block` leaves: kBlock values each of base, delta and base_rest.
constexpr int64_t kRowValues = 3 * kBlock;
// The caller's memory: row values, dq's sums, and how many blocks of keys each of those contains.
float* row_values_of(const AttentionBackward& a) { return static_cast<float*>(a.memory); }
float* dq_sums_of(const AttentionBackward& a) {
  return row_values_of(a) + a.problem.B * a.problem.G * count_row_blocks(a.problem) * kRowValues;
}
int32_t* progress_of(const AttentionBackward& a) {
  const int64_t blocks = a.problem.B * a.problem.G * count_row_blocks(a.problem);
  return reinterpret_cast<int32_t*>(dq_sums_of(a) + blocks * kBlock * round_up(a.problem.H, 16));
}

PYPAR_INLINE float* row_values(const AttentionBackward& a, int64_t batch, int64_t head, int64_t row_block) {
  return row_values_of(a) +
         ((batch * a.problem.G + head) * count_row_blocks(a.problem) + row_block) * kRowValues;
}

struct Task {
  int64_t batch, head, key_block;
  int64_t first_key, num_keys;
  Rows q, dout, dq;
};

// Per row of a block of rows: `base`, with which p = 2^(score * factor - base), and delta = dout . out -
// dlse, with which ds = p * (dp - delta). delta's products are summed in the order of dp's: a row that sees
// one key then gets exactly 0.
void prepare_row_block(const AttentionBackward& a, int64_t batch, int64_t head, int64_t row_block) {
  const AttentionProblem& s = a.problem;
  const int64_t group = s.N / s.G, first = row_block * kBlock;
  const int64_t count = smaller(kBlock, s.T * group - first);
  const Scratch m(s);
  float *const dout = m.v_transposed, *const out = m.dout;
  pack(rows_of(a.dout, batch, head, group), first, count, s.Hv, 1.0f, m.dv, m.padded_hv);
  transpose(m.dv, m.padded_hv, count, m.padded_hv, dout, kBlock);
  pack(rows_of(a.out, batch, head, group), first, count, s.Hv, 1.0f, m.dv, m.padded_hv);
  transpose(m.dv, m.padded_hv, count, m.padded_hv, out, kBlock);
  float* const base = row_values(a, batch, head, row_block);
  float* const delta = base + kBlock;
  float* const base_rest = delta + kBlock;
  for (int64_t i = 0; i < count; i += kWidth) {
    Float sum = zero();
    for (int64_t j = 0; j < s.Hv; ++j) sum += load(dout + j * kBlock + i) * load(out + j * kBlock + i);
    store(delta + i, sum);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i;
    const int64_t index = (batch * s.N + head * group + row % group) * s.T + row / group;
    const float lse = a.lse[index];
    // A row that saw no key: p becomes 2^-huge = 0.
    base[i] = lse == -__builtin_inff() ? 3e38f : lse * kLog2e;
    base_rest[i] =
        lse == -__builtin_inff() ? 0.0f : static_cast<float>(lse * 1.44269504088896340736 - base[i]);
    if (a.dlse) delta[i] -= a.dlse[index];
  }
}

// The last key that a row sees, counted from the task's first.
PYPAR_INLINE int64_t limit_of(const AttentionProblem& s, const Task& task, int64_t row) {
  return ((s.right == 0) ? row / (s.N / s.G) + s.S - s.T : s.S - 1) - task.first_key;
}

// p: scores -> probabilities, ds: dp -> gradient of the scores (without the scale), for `count` rows.
template <bool kMasked>
void differentiate(const AttentionProblem& s, const Task& task, int64_t first, int64_t count,
                   const float* values, const Scratch& m) {
  const int64_t width = round_up(task.num_keys, kWidth);
  const float factor = score_factor(s);
  for (int64_t i = 0; i < count; ++i) {
    float* p = m.p + i * kBlock;
    float* ds = m.ds + i * kBlock;
    const Float base = broadcast(values[i]), delta = broadcast(values[kBlock + i]);
    const Float rest = broadcast(values[2 * kBlock + i]);
    const Int limit = broadcast_int(kMasked ? static_cast<int32_t>(limit_of(s, task, first + i)) : 0);
    for (int64_t j = 0; j < width; j += kWidth) {
      const Float probability = exp2((load(p + j) * factor - base) - rest);
      const Float gradient = probability * (load(ds + j) - delta);
      const Int seen = lane_indices() + static_cast<int32_t>(j) <= limit;
      store(p + j, kMasked ? select(seen, probability, zero()) : probability);
      store(ds + j, kMasked ? select(seen, gradient, zero()) : gradient);
    }
  }
}

// What the causal mask leaves of each product of a block of rows and a block of keys.
struct Trim {
  Range keys[kGroups];           // per group of rows, in vectors
  Range keys_in_depth[kGroups];  // per group of rows, in keys
  Range rows[kGroups];           // per group of keys, in rows

  Trim(const AttentionProblem& s, const Task& task, int64_t first, int64_t count) {
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t last = limit_of(s, task, first + smaller(row + kRows, count) - 1);
      const int64_t end = larger(0, smaller(task.num_keys, last + 1));
      keys[row / kRows] = {0, (end + kWidth - 1) / kWidth};
      keys_in_depth[row / kRows] = {0, end};
    }
    int64_t row = 0;
    for (int64_t key = 0; key < task.num_keys; key += kRows) {
      while (row < count && limit_of(s, task, first + row) < key) ++row;
      rows[key / kRows] = {row, count};
    }
  }
};

// Waits until every earlier block of keys has been added to the rows' dq. False if one failed.
bool await_turn(const int32_t* progress, int32_t turn) {
  for (int spins = 0;; ++spins) {
    const int32_t now = __atomic_load_n(progress, __ATOMIC_ACQUIRE);
    if (now == turn) return true;
    if (now < 0) return false;
    if (spins < 200) {
#  if defined(__x86_64__)
      _mm_pause();
#  endif
    } else {
      yield_thread();  // the other thread may need this core
    }
  }
}

void add_dq(const AttentionBackward& a, const Task& task, int64_t row_block, int64_t count, const Trim* trim,
            const Scratch& m) {
  const AttentionProblem& s = a.problem;
  const int64_t num_row_blocks = count_row_blocks(s);
  const int64_t index = (task.batch * s.G + task.head) * num_row_blocks + row_block;
  float* sum = dq_sums_of(a) + index * kBlock * m.padded_h;
  int32_t* progress = progress_of(a) + index;
  const int64_t vecs = m.padded_h / kWidth;
  const Range* depth = trim ? trim->keys_in_depth : nullptr;
  if (!await_turn(progress, static_cast<int32_t>(task.key_block))) return;
  if (task.key_block == 0) {
    multiply<false, false>(count, vecs, task.num_keys, m.ds, kBlock, m.k, m.padded_h, sum, m.padded_h,
                           nullptr, depth);
  } else {
    multiply<false, true>(count, vecs, task.num_keys, m.ds, kBlock, m.k, m.padded_h, sum, m.padded_h, nullptr,
                          depth);
  }
  const int64_t last_row = row_block * kBlock + count - 1;
  if (limit_of(s, task, last_row) < kBlock || task.first_key + kBlock >= s.S) {  // no later key is seen
    unpack(sum, m.padded_h, count, s.H, s.scale, task.dq, row_block * kBlock);
  }
  // Not a plain store: it would wipe out the mark of a thread that failed, for which the others would then
  // wait.
  int32_t expected = static_cast<int32_t>(task.key_block);
  __atomic_compare_exchange_n(progress, &expected, expected + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

// One block of rows against the task's keys.
void propagate(const AttentionBackward& a, const Task& task, int64_t row_block, const Scratch& m) {
  const AttentionProblem& s = a.problem;
  const int64_t first = row_block * kBlock;
  const int64_t count = smaller(kBlock, s.T * (s.N / s.G) - first);
  const int64_t key_vecs = (task.num_keys + kWidth - 1) / kWidth;
  const bool masked = limit_of(s, task, first) < task.num_keys - 1;
  const Trim trim_of_mask(s, task, first, masked ? count : 0);
  const Trim* trim = masked ? &trim_of_mask : nullptr;
  const Range* keys = trim ? trim->keys : nullptr;
  const Range* rows = trim ? trim->rows : nullptr;
  const float* values = row_values(a, task.batch, task.head, row_block);
  pack(task.q, first, count, s.H, score_sign(s), m.q, m.padded_h);
  pack(task.dout, first, count, s.Hv, 1.0f, m.dout, m.padded_hv);
  multiply<false, false>(count, key_vecs, s.H, m.q, m.padded_h, m.k_transposed, kBlock, m.p, kBlock, keys,
                         nullptr);
  multiply<false, false>(count, key_vecs, s.Hv, m.dout, m.padded_hv, m.v_transposed, kBlock, m.ds, kBlock,
                         keys, nullptr);
  if (masked) {
    differentiate<true>(s, task, first, count, values, m);
  } else {
    differentiate<false>(s, task, first, count, values, m);
  }
  multiply<true, true>(task.num_keys, m.padded_hv / kWidth, count, m.p, kBlock, m.dout, m.padded_hv, m.dv,
                       m.padded_hv, nullptr, rows);
  multiply<true, true>(task.num_keys, m.padded_h / kWidth, count, m.ds, kBlock, m.q, m.padded_h, m.dk,
                       m.padded_h, nullptr, rows);
  add_dq(a, task, row_block, count, trim, m);
}

void clear(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(x + i, zero());
}

void run_task(const AttentionBackward& a, int64_t batch, int64_t head, int64_t key_block) {
  const AttentionProblem& s = a.problem;
  const int64_t group = s.N / s.G, first_key = key_block * kBlock;
  const Task task{batch,
                  head,
                  key_block,
                  first_key,
                  smaller(kBlock, s.S - first_key),
                  rows_of(a.problem.q, batch, head, group),
                  rows_of(a.dout, batch, head, group),
                  rows_of(a.dq, batch, head, group)};
  const Scratch m(s);
  pack(rows_of(a.problem.v, batch, head, 1), first_key, task.num_keys, s.Hv, 1.0f, m.dv, m.padded_hv);
  transpose(m.dv, m.padded_hv, task.num_keys, m.padded_hv, m.v_transposed, kBlock);
  pack(rows_of(a.problem.k, batch, head, 1), first_key, task.num_keys, s.H, 1.0f, m.k, m.padded_h);
  transpose(m.k, m.padded_h, task.num_keys, m.padded_h, m.k_transposed, kBlock);
  clear(m.dk, kBlock * m.padded_h);
  clear(m.dv, kBlock * m.padded_hv);
  const int64_t first_position = (s.right == 0) ? larger(0, first_key - (s.S - s.T)) : 0;
  for (int64_t i = first_position * group / kBlock; i < count_row_blocks(s); ++i) propagate(a, task, i, m);
  // q was packed with the scale's sign.
  unpack(m.dk, m.padded_h, task.num_keys, s.H, __builtin_fabsf(s.scale), rows_of(a.dk, batch, head, 1),
         first_key);
  unpack(m.dv, m.padded_hv, task.num_keys, s.Hv, 1.0f, rows_of(a.dv, batch, head, 1), first_key);
}

// dq = 0 for the rows of a block that no key reaches.
void clear_unseen(const AttentionBackward& a, int64_t batch, int64_t head, int64_t row_block) {
  const AttentionProblem& s = a.problem;
  const int64_t group = s.N / s.G, first = row_block * kBlock;
  const int64_t unseen_positions = s.S == 0 ? s.T : (s.right == 0) ? larger(0, s.T - s.S) : 0;
  const int64_t end = smaller(first + kBlock, unseen_positions * group);
  const float zeros[kWidth] = {};
  const Rows dq = rows_of(a.dq, batch, head, group);
  for (int64_t row = first; row < end; ++row) {
    for (int64_t i = 0; i < s.H; i += kWidth) {
      Rows part = dq;
      part.data += i * dq.element_stride * element_size(dq.dtype);
      unpack(zeros, kWidth, 1, smaller(kWidth, s.H - i), 1.0f, part, row);
    }
  }
}

}  // namespace

void attention_backward(const AttentionBackward& a) {
  const AttentionProblem& s = a.problem;
  const int64_t heads = s.B * s.G, num_row_blocks = count_row_blocks(s);
  const int64_t num_key_blocks = (s.S + kBlock - 1) / kBlock;
  parallel_for(heads * num_row_blocks, 1, s.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / num_row_blocks, row_block = i % num_row_blocks;
      progress_of(a)[i] = 0;
      clear_unseen(a, head / s.G, head % s.G, row_block);
      prepare_row_block(a, head / s.G, head % s.G, row_block);
    }
  });
  // Key blocks in order, and for each of them all heads, so that threads rarely meet in one head's dq.
  parallel_for(heads * num_key_blocks, 1, s.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads;
      try {
        run_task(a, head / s.G, head % s.G, task / heads);
      } catch (...) {
        // No memory. The other threads must not wait for this one.
        for (int64_t i = 0; i < heads * num_row_blocks; ++i)
          __atomic_store_n(progress_of(a) + i, -1, __ATOMIC_RELEASE);
        throw;
      }
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

int64_t memory_bytes(const pypar::AttentionProblem& p) {
  const int64_t blocks = p.B * p.G * ((p.T * (p.N / p.G) + 95) / 96);
  return blocks * (96 * ((p.H + 15) / 16 * 16 + 3) * 4 + 4) + 64;
}

}  // namespace

PYPAR_BIND(attention_backward) {
  pypar::bind_attention_backward(module, check, memory_bytes, [](const pypar::AttentionBackward& a) {
    if (a.accumulate || a.dbias) throw py::value_error("accumulate and dbias are not there yet");
    pypar::launch<pypar::attention_backward_kernels>(a);
  });
}

#endif
