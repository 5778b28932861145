// Attention, backward: five products per pair of blocks, scores recomputed from lse (Dao et al., arXiv
// 2205.14135).
//
// A task is one block of keys of one key/value head: it sums dk and dv over the query rows of the whole group
// of heads in its own memory and rounds them once. dq needs a sum over tasks. It is made in the order of the
// keys, each task waiting until its predecessor has passed a block of rows, so the result is the same for any
// number of threads; tasks start in that order too, so whoever waits, waits for a task that runs.
#include "attention/arguments.h"

namespace pypar {
PYPAR_KERNEL(attention_backward, AttentionBackward)
}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "attention/cpu/combine.h"
#  if defined(__AVX512BF16__)
#    include "attention/cpu/half/backward.h"
#  endif
#  include "attention/cpu/fp32.h"
#  include "attention/cpu/scores.h"
#  include "core/parallel.h"

namespace pypar::PYPAR_ISA {
namespace {

// The parts of a call, and where they are in the caller's memory.
struct TileScheduler {
  const AttentionBackward& a;
  const AttentionProblem& p;
  int64_t num_sequences;
  int64_t *key_blocks, *row_blocks;  // per sequence, and once more: how many stand before it, of one head
  float* values;                     // per block of rows row_block_floats
  int32_t* progress;  // per block of rows: how many blocks of keys its dq contains; < 0: failed

  explicit TileScheduler(const AttentionBackward& arguments) : a(arguments), p(arguments.problem) {
    num_sequences = count_sequences(p);
    key_blocks = static_cast<int64_t*>(a.memory);
    row_blocks = key_blocks + num_sequences + 1;
    key_blocks[0] = row_blocks[0] = 0;
    for (int64_t i = 0; i < num_sequences; ++i) {
      const Sequence s = sequence_of(p, i);
      key_blocks[i + 1] = key_blocks[i] + blocks_of(s.S, kBlock);
      row_blocks[i + 1] = row_blocks[i] + count_row_blocks(p, s);
    }
    values = reinterpret_cast<float*>(static_cast<char*>(a.memory) + index_bytes(p));
    progress = reinterpret_cast<int32_t*>(values + num_row_blocks() * row_block_floats(p));
  }

  int64_t num_row_blocks() const { return row_blocks[num_sequences] * p.G; }
  int64_t num_key_blocks() const { return key_blocks[num_sequences] * p.G; }
  int64_t row_block_index(int64_t sequence, int64_t head, int64_t row_block) const {
    return row_blocks[sequence] * p.G + head * (row_blocks[sequence + 1] - row_blocks[sequence]) + row_block;
  }
};

// Rows [first, first + count) of a key/value head.
struct RowSpan {
  int64_t first, count;
};

RowSpan rows_of_block(const TileScheduler& scheduler, const Sequence& s, int64_t row_block) {
  const int64_t first = row_block * kBlock;
  return {first, smaller(kBlock, s.T * (scheduler.p.N / scheduler.p.G) - first)};
}

Range keys_of_rows(const TileScheduler& scheduler, const Sequence& s, const RowSpan& rows) {
  const int64_t group = scheduler.p.N / scheduler.p.G;
  return keys_seen(s, rows.first / group, (rows.first + rows.count - 1) / group);
}

void write_rows(const float* from, int64_t stride, int64_t count, int64_t size, float factor, bool add,
                const Rows& target, int64_t first) {
  if (add) {
    unpack_add(from, stride, count, size, factor, target, first);
  } else {
    unpack(from, stride, count, size, factor, target, first);
  }
}

// What is kept of a block of rows, kBlock values of each: p = 2^(score * factor - base), ds = p * (dp -
// delta). base = whole + rest, of which the first loses nothing in the exponent.
struct RowValues {
  float *base, *whole, *rest, *delta;
};

RowValues row_values(float* values) {
  return {values, values + kBlock, values + 2 * kBlock, values + 3 * kBlock};
}

// The same of one row.
struct RowExponent {
  Float base, whole, rest;
  float factor, least;
};

RowExponent row_exponent(const RowValues& values, int64_t row, float factor) {
  // A score below `least` has p = 0.
  const float span = values.base[row] - 200.0f;
  return {broadcast(values.base[row]), broadcast(values.whole[row]), broadcast(values.rest[row]), factor,
          factor > 1e-30f ? span / factor : -3e38f};
}

// 2^(score * factor - base), the product as if exact.
PYPAR_INLINE Float probability_of(Float score, const RowExponent& e) {
  const Float x = max(broadcast(e.least), score);  // in this order NaN is kept
  const Float n = round_to_whole(x * e.factor - e.base);
  const Float f = product_minus(x, e.factor, n + e.whole) - e.rest;
#  if defined(__AVX512F__)
  return exp2_of_parts(n, f);
#  else
  return exp2_of_parts(n < -127.0f ? broadcast(-127.0f) : n > 128.0f ? broadcast(128.0f) : n, f);
#  endif
}

// delta = dout . out - dlse: its products are summed in the order of dp's, so a row that sees one key gets
// exactly 0.
void prepare_row_block(const TileScheduler& scheduler, const Sequence& s, int64_t head, int64_t row_block,
                       float* values) {
  const AttentionProblem& p = scheduler.p;
  const int64_t group = p.N / p.G, padded = round_up(p.Hv, kWidth);
  const RowSpan rows = rows_of_block(scheduler, s, row_block);
  float* const packed = static_cast<float*>(thread_scratch(3 * kBlock * padded * sizeof(float)));
  float *const dout = packed + kBlock * padded, *const out = dout + kBlock * padded;
  pack(rows_of(scheduler.a.dout, s.batch, s.q_begin, head, group), rows.first, rows.count, p.Hv, 1.0f, packed,
       padded);
  transpose(packed, padded, rows.count, padded, dout, kBlock);
  pack(rows_of(scheduler.a.out, s.batch, s.q_begin, head, group), rows.first, rows.count, p.Hv, 1.0f, packed,
       padded);
  transpose(packed, padded, rows.count, padded, out, kBlock);
  const RowValues row = row_values(values);
  // lse in the unit of the exponents. Not by log2(e): the factor that scores are multiplied by is rounded,
  // and what matters is their difference.
  const ScoreTerms terms = score_terms(p);
  const double factor =
      terms.unit > 1e-30f ? static_cast<double>(terms.factor) / terms.unit : 1.44269504088896340736;
  for (int64_t i = 0; i < rows.count; i += kWidth) {
    Float total = zero();
    for (int64_t begin = 0; begin < p.Hv; begin += kChunk) {
      Float sum = zero();
      for (int64_t j = begin; j < smaller(p.Hv, begin + kChunk); ++j) {
        sum += load(dout + j * kBlock + i) * load(out + j * kBlock + i);
      }
      total += sum;
    }
    store(row.delta + i, total);
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t index = lse_index(p, s, head, rows.first + i);
    double lse = scheduler.a.lse[index];
    if (scheduler.a.lse_rest) lse += scheduler.a.lse_rest[index];
    // A row that saw no key: p becomes 2^-huge = 0.
    const double base = lse == kNothing ? 1e6 : lse * factor;
    row.base[i] = static_cast<float>(base);
    row.whole[i] = __builtin_rintf(row.base[i]);
    row.rest[i] = static_cast<float>(base - row.whole[i]);
    if (scheduler.a.dlse) row.delta[i] -= scheduler.a.dlse[index];
  }
}

// dq = 0 for a block of rows that sees no key, and so is part of no task.
void clear_unseen(const TileScheduler& scheduler, const Sequence& s, int64_t head, int64_t row_block) {
  const AttentionProblem& p = scheduler.p;
  const RowSpan rows = rows_of_block(scheduler, s, row_block);
  const Range keys = keys_of_rows(scheduler, s, rows);
  if (keys.begin < keys.end || scheduler.a.accumulate) return;
  const int64_t padded = round_up(p.H, kWidth);
  auto* zeros = static_cast<float*>(thread_scratch(padded * sizeof(float)));
  for (int64_t i = 0; i < padded; i += kWidth) store(zeros + i, zero());
  unpack(zeros, 0, rows.count, p.H, 1.0f, rows_of(scheduler.a.dq, s.batch, s.q_begin, head, p.N / p.G),
         rows.first);
}

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

// What the mask leaves of each product of a block of rows and a block of keys.
struct Trim {
  int32_t begin[kBlock], end[kBlock];  // per row, the keys it sees, counted from the block's first
  Range vectors[kGroups];              // per group of rows, the same in vectors
  Range keys[kGroups];                 // per group of rows, in keys
  Range rows[kGroups];                 // per group of keys, in rows
  bool masked;

  Trim(const TileScheduler& scheduler, const Sequence& s, const RowSpan& span, int64_t first_key,
       int64_t num_keys) {
    const int64_t group = scheduler.p.N / scheduler.p.G;
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t t = (span.first + i) / group;
      const Range seen = keys_seen(s, t, t);
      begin[i] = static_cast<int32_t>(larger(0, smaller(num_keys, seen.begin - first_key)));
      end[i] = static_cast<int32_t>(larger(begin[i], smaller(num_keys, seen.end - first_key)));
    }
    masked = begin[span.count - 1] > 0 || end[0] < num_keys;
    if (!masked) return;
    for (int64_t row = 0; row < span.count; row += kRows) {
      const int64_t last = smaller(row + kRows, span.count) - 1;
      const int64_t key_end = larger(begin[row], end[last]);
      keys[row / kRows] = {begin[row], key_end};
      vectors[row / kRows] = {begin[row] / kWidth, (key_end + kWidth - 1) / kWidth};
    }
    int64_t from = 0, to = 0;
    for (int64_t key = 0; key < num_keys; key += kRows) {
      while (from < span.count && end[from] <= key) ++from;
      while (to < span.count && begin[to] < key + kRows) ++to;
      rows[key / kRows] = {from, larger(from, to)};
    }
  }
};

// One block of keys of one key/value head.
template <class Arithmetic>
struct Task {
  const TileScheduler& scheduler;
  const AttentionBackward& a;
  const AttentionProblem& p;
  const int64_t sequence;
  const Sequence s;
  const int64_t head, group, key_block, first_key, num_keys;
  const Arithmetic m;
  const ScoreTerms terms;
  const bool decoded;  // forward was by decoding
  const Rows q, dout, dq;
  char *keys, *rows, *dk, *dv, *scratch;  // of the arithmetic
  float *s_p, *dp_ds;                     // [row][kBlock]: scores, then p; dp, then ds
  float *bias, *slope, *keep;             // [kBlock], of one row
  float* staging;                         // [kBlock][padded H or Hv]

  Task(const TileScheduler& of, int64_t index, int64_t key_head, int64_t block)
      : scheduler(of),
        a(of.a),
        p(of.p),
        sequence(index),
        s(sequence_of(p, index)),
        head(key_head),
        group(p.N / p.G),
        key_block(block),
        first_key(block * kBlock),
        num_keys(smaller(kBlock, s.S - first_key)),
        m(p),
        terms(score_terms(p)),
        decoded(forward_shape(p, s).decode),
        q(rows_of(p.q, s.batch, s.q_begin, head, group)),
        dout(rows_of(a.dout, s.batch, s.q_begin, head, group)),
        dq(rows_of(a.dq, s.batch, s.q_begin, head, group)) {
    constexpr int64_t kSquare = kBlock * kBlock * 4;
    const int64_t bytes[] = {m.key_operands_bytes(),
                             m.row_operands_bytes(),
                             m.dk_bytes(),
                             m.dv_bytes(),
                             m.scratch_bytes(),
                             kSquare,
                             kSquare,
                             3 * kBlock * 4,
                             kBlock * padded_size(larger(p.H, p.Hv)) * 4};
    int64_t total = 0;
    for (int64_t size : bytes) total += size;
    char* at = static_cast<char*>(thread_scratch(total));
    char** const operands[] = {&keys, &rows, &dk, &dv, &scratch};
    for (int i = 0; i < 5; at += bytes[i++]) *operands[i] = at;
    s_p = reinterpret_cast<float*>(at);
    dp_ds = s_p + kBlock * kBlock;
    bias = dp_ds + kBlock * kBlock;
    slope = bias + kBlock;
    keep = slope + kBlock;
    staging = keep + kBlock;
  }

  // scores -> probabilities, dp -> gradient of the scores (without the scale).
  void differentiate(const RowSpan& span, const Trim& trim, const RowValues& values) const {
    const int64_t width = round_up(num_keys, kWidth);
    for (int64_t i = 0; i < span.count; ++i) {
      float *const x = s_p + i * kBlock, *const y = dp_ds + i * kBlock;
      const int64_t begin = trim.begin[i], end = trim.end[i];
      const RowExponent exponent = row_exponent(values, i, terms.factor);
      const Float delta = broadcast(values.delta[i]);
      for (int64_t j = 0; j < width; j += kWidth) {
        if (j + kWidth <= begin || j >= end) {
          store(x + j, zero());
          store(y + j, zero());
          continue;
        }
        Float probability = probability_of(load(x + j), exponent);
        Float gradient = probability * (load(y + j) - delta);
        if (j < begin || j + kWidth > end) {
          const Int key = lane_indices() + static_cast<int32_t>(j);
          const Int seen = (key >= trim.begin[i]) & (key < trim.end[i]);
          probability = select(seen, probability, zero());
          gradient = select(seen, gradient, zero());
        }
        store(x + j, probability);
        store(y + j, gradient);
      }
    }
  }

  // The same where scores are more than products, or dropped.
  void differentiate_general(const RowSpan& span, const Trim& trim, const RowValues& values) const {
    const int64_t width = round_up(num_keys, kWidth);
    for (int64_t i = 0; i < span.count; ++i) {
      float *const x = s_p + i * kBlock, *const y = dp_ds + i * kBlock;
      const int64_t begin = trim.begin[i], end = trim.end[i];
      const RowTerms row = row_terms(p, terms, s, head, span.first + i);
      if (terms.general) {
        if (p.bias.data) pack_bias(span.first + i);
        final_row(p, row, first_key, begin, end, p.bias.data ? bias : nullptr, x,
                  p.softcap > 0.0f ? slope : nullptr);
      }
      if (terms.dropout) kept_row(p, terms, s, row, first_key, begin, end, keep);
      const RowExponent exponent = row_exponent(values, i, terms.factor);
      const Float delta = broadcast(values.delta[i]);
      for (int64_t j = 0; j < width; j += kWidth) {
        const Int key = lane_indices() + static_cast<int32_t>(j);
        Int seen = (key >= trim.begin[i]) & (key < trim.end[i]);
        if (terms.hides) seen &= (Int)(load(bias + j) != -__builtin_inff());
        const Float kept = terms.dropout ? load(keep + j) : broadcast(1.0f);
        const Float probability = select(seen, probability_of(load(x + j), exponent), zero());
        // Where p is 0, dp and the slope may be anything.
        const Int some = (Int)(probability > 0.0f) | (Int)(probability != probability);
        const Float gradient = select(some, probability * (load(y + j) * kept - delta), zero());
        if (a.dbias) store_dbias(row, span.first + i, j, gradient);
        store(x + j, select(seen, probability * kept, zero()));
        store(y + j, p.softcap > 0.0f ? select(some, gradient * load(slope + j), zero()) : gradient);
      }
    }
  }

  void store_dbias(const RowTerms& row, int64_t index, int64_t j, Float gradient) const {
    float* to = a.dbias + ((s.batch * p.N + row.head) * p.T + index / group) * p.S + first_key + j;
    if (j + kWidth <= num_keys) {
      store(to, gradient);
    } else if (j < num_keys) {
      store_partial(to, gradient, num_keys - j);
    }
  }

  void pack_bias(int64_t row) const {
    const Rows source = bias_rows(p, s.batch, head, first_key);
    pack_row(source, row, num_keys, bias);
  }

  void add_dq(int64_t row_block, const RowSpan& span, const Trim& trim) const {
    const int64_t index = scheduler.row_block_index(sequence, head, row_block);
    float* sum = scheduler.values + index * row_block_floats(p) + kRowValues;
    int32_t* progress = scheduler.progress + index;
    const Range seen = keys_of_rows(scheduler, s, span);
    const auto turn = static_cast<int32_t>(key_block - seen.begin / kBlock);
    if (!await_turn(progress, turn)) return;
    m.add_dq(dp_ds, span.count, keys, num_keys, trim.masked ? trim.keys : nullptr, turn == 0, sum, scratch);
    if (seen.end <= first_key + kBlock) {  // no later key is seen
      int64_t stride = padded_size(p.H);
      const float* result = m.read_dq(sum, span.count, staging, &stride);
      write_rows(result, stride, span.count, p.H, p.scale, a.accumulate, dq, span.first);
    }
    // Not a plain store: it would wipe out the mark of a thread that failed, for which the others would then
    // wait.
    int32_t expected = turn;
    __atomic_compare_exchange_n(progress, &expected, turn + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
  }

  // One block of rows against the task's keys.
  void propagate(int64_t row_block) const {
    const RowSpan span = rows_of_block(scheduler, s, row_block);
    const Trim trim(scheduler, s, span, first_key, num_keys);
    const RowValues values = row_values(
        scheduler.values + scheduler.row_block_index(sequence, head, row_block) * row_block_floats(p));
    m.pack_row_operands(q, dout, span.first, span.count, terms.sign, rows, scratch);
    m.products(rows, span.count, keys, num_keys, trim.masked ? trim.vectors : nullptr, s_p, dp_ds);
    // lse is the logarithm of a sum over these very scores.
    if (decoded) m.decoded_scores(rows, span.count, keys, num_keys, s_p);
    if (terms.general || terms.dropout || a.dbias) {
      differentiate_general(span, trim, values);
    } else {
      differentiate(span, trim, values);
    }
    // If decoded, there is one block of rows: none needs the scores again.
    if ((trim.masked || terms.hides) && m.cleanse_operands(rows, span.count, keys, num_keys))
      note_left_out(a.left_out);
    m.add_dk_dv(s_p, dp_ds, rows, span.count, num_keys, trim.masked ? trim.rows : nullptr, dk, dv, scratch);
    add_dq(row_block, span, trim);
  }

  void run() const {
    m.pack_key_operands(rows_of(p.k, s.batch, s.k_begin, head, 1), rows_of(p.v, s.batch, s.k_begin, head, 1),
                        first_key, num_keys, keys, scratch);
    m.clear_sums(dk, dv);
    const Range queries = queries_seeing(s, first_key, first_key + num_keys - 1);
    const int64_t begin = queries.begin * group / kBlock, end = blocks_of(queries.end * group, kBlock);
    bool has_totals = false;
    if (queries.begin < queries.end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i % kBlocksOfSums == 0 && i > begin) {
          m.set_aside(dk, dv, !has_totals);
          has_totals = true;
        }
        propagate(i);
      }
      if (has_totals) m.add_totals(dk, dv);
    }
    int64_t stride = padded_size(p.H);
    const float* result = m.read_dk(dk, num_keys, staging, &stride);
    // q was packed with the sign.
    write_rows(result, stride, num_keys, p.H, terms.sign * p.scale, a.accumulate,
               rows_of(a.dk, s.batch, s.k_begin, head, 1), first_key);
    stride = padded_size(p.Hv);
    result = m.read_dv(dv, num_keys, staging, &stride);
    write_rows(result, stride, num_keys, p.Hv, 1.0f, a.accumulate, rows_of(a.dv, s.batch, s.k_begin, head, 1),
               first_key);
  }
};

void prepare(const TileScheduler& scheduler, int64_t index) {
  const AttentionProblem& p = scheduler.p;
  const int64_t sequence = find_entry(scheduler.row_blocks, scheduler.num_sequences, index / p.G);
  const int64_t blocks = scheduler.row_blocks[sequence + 1] - scheduler.row_blocks[sequence];
  const int64_t in_sequence = index - scheduler.row_blocks[sequence] * p.G;
  const int64_t head = in_sequence / blocks, row_block = in_sequence % blocks;
  const Sequence s = sequence_of(p, sequence);
  scheduler.progress[index] = 0;
  clear_unseen(scheduler, s, head, row_block);
  prepare_row_block(scheduler, s, head, row_block, scheduler.values + index * row_block_floats(p));
}

template <class Arithmetic>
void run_task(const TileScheduler& scheduler, int64_t index) {
  const AttentionProblem& p = scheduler.p;
  // Key blocks in order, and for each of them all heads, so that threads rarely meet in one head's dq.
  const int64_t heads = (p.cu_seqlens_k ? 1 : p.B) * p.G;
  const int64_t head = index % heads, block = index / heads;
  const int64_t sequence =
      p.cu_seqlens_k ? find_entry(scheduler.key_blocks, scheduler.num_sequences, block) : head / p.G;
  const int64_t in_sequence = p.cu_seqlens_k ? block - scheduler.key_blocks[sequence] : block;
  const Task<Arithmetic> task(scheduler, sequence, head % p.G, in_sequence);
  task.run();
}

template <class Arithmetic>
void run_backward(const AttentionBackward& a) {
  const TileScheduler scheduler(a);
  const int num_threads = a.problem.num_threads;
  parallel_for(scheduler.num_row_blocks(), 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) prepare(scheduler, i);
  });
  parallel_for(scheduler.num_key_blocks(), 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      try {
        run_task<Arithmetic>(scheduler, i);
      } catch (...) {
        // No memory. The other threads must not wait for this one.
        for (int64_t j = 0; j < scheduler.num_row_blocks(); ++j) {
          __atomic_store_n(scheduler.progress + j, -1, __ATOMIC_RELEASE);
        }
        throw;
      }
    }
  });
}

}  // namespace

void attention_backward(const AttentionBackward& a) {
#  if defined(__AVX512BF16__)
  if (half::takes(a)) return half::attention_backward(a);
#  endif
  run_backward<Fp32Arithmetic>(a);
}

}  // namespace pypar::PYPAR_ISA

#else

#  include "attention/binding.h"
#  include "attention/cpu/half/tile_scheduler.h"
#  include "attention/cpu/nonfinite.h"

PYPAR_BIND(attention_backward) {
  pypar::bind_attention_backward(
      module, pypar::check_attention_lengths, pypar::half::backward_bytes,
      pypar::launch_with_unseen<pypar::attention_backward_kernels, pypar::AttentionBackward>);
}

#endif
