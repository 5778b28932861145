// Attention's backward with bf16 or fp16 products, by blocks of keys, as in attention/cpu/backward.cpp.
//
// Scores are computed as [key][row]: P^T and dS^T are then left operands of dv and dk as they are stored, and
// dS^T with keys in pairs is the right operand of dq^T = k^T dS^T. The operands that are made of q and dout,
// four forms, are packed once for all blocks of keys.
#pragma once

#include "attention/cpu/half/tile_products.h"
#include "attention/cpu/half/tile_scheduler.h"
#include "core/parallel.h"

namespace pypar::PYPAR_ISA {
namespace half {
using namespace pypar::half;

constexpr int64_t kRowTiles = kBackwardRows / 16;
constexpr int64_t kKeyTiles = kBackwardKeys / 16;

struct BackwardTask {
  const AttentionBackward* a;
  const Sequence* s;
  const BackwardMemory* memory;
  const RowBlockLayout* layout;
  Range row_blocks;        // of this chunk
  bool is_first, is_last;  // of the chunks whose rows see these keys, as far as `sums` goes
  float* sums;             // of dk and dv, over the chunks before
  int64_t head, key_block, first_key, num_keys;
  int64_t h_tiles, hv_tiles;  // of 16
  float gradient_scale;       // of dS, a power of two
  float gap_scale;            // the same without that of P
  // Left operands: keys and values, keys transposed with keys in pairs.
  Bits *k, *v, *k_transposed;
  float *dk, *dv;                // [key tile][h tile]
  float *scores, *dp;            // [2][kRowTiles], of 32 keys
  Bits *p, *ds, *ds_transposed;  // [2][2], [2][2], [keys / 32][kRowTiles]
};

// multiply_tiles for any number of tiles.
static void multiply(int64_t row_tiles, int64_t column_tiles, int64_t num_k, const Bits* left,
                     int64_t left_row_step, int64_t left_k_step, const Bits* right, int64_t right_column_step,
                     int64_t right_k_step, float* result, int64_t result_row_step, int64_t result_column_step,
                     bool accumulate) {
  for (int64_t j = 0; j < column_tiles; j += 2) {
    for (int64_t i = 0; i < row_tiles; i += 2) {
      const Bits* a = left + i * left_row_step;
      const Bits* b = right + j * right_column_step;
      float* c = result + i * result_row_step + j * result_column_step;
      const bool two_rows = i + 1 < row_tiles, two_columns = j + 1 < column_tiles;
      if (two_rows && two_columns) {
        multiply_tiles<2, 2>(num_k, a, left_row_step, left_k_step, b, right_column_step, right_k_step, c,
                             result_row_step, result_column_step, accumulate);
      } else if (two_rows) {
        multiply_tiles<2, 1>(num_k, a, left_row_step, left_k_step, b, right_column_step, right_k_step, c,
                             result_row_step, result_column_step, accumulate);
      } else if (two_columns) {
        multiply_tiles<1, 2>(num_k, a, left_row_step, left_k_step, b, right_column_step, right_k_step, c,
                             result_row_step, result_column_step, accumulate);
      } else {
        multiply_tiles<1, 1>(num_k, a, left_row_step, left_k_step, b, right_column_step, right_k_step, c,
                             result_row_step, result_column_step, accumulate);
      }
    }
  }
}

// The blocks of keys that a block of rows sees: [begin, end).
static Range key_blocks_of(const AttentionProblem& p, const Sequence& s, int64_t block) {
  const int64_t group = p.N / p.G, first = block * kBackwardRows;
  const int64_t last = smaller(first + kBackwardRows, s.T * group) - 1;
  const Range keys = keys_seen(s, first / group, last / group);
  if (keys.begin == keys.end) return {0, 0};
  return {keys.begin / kBackwardKeys, (keys.end - 1) / kBackwardKeys + 1};
}

// Rows of dq, dk or dv: target (+)= tiles * factor; tile (i, j) of 16 x 16 stands at i * row_step + j *
// column_step.
static void store_tiles(const float* tiles, int64_t row_step, int64_t column_step, int64_t count,
                        int64_t size, float factor, bool accumulate, const RowSource& target, int64_t first) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = tiles + i / 16 * row_step + i % 16 * 16;
    const int64_t offset = target.offset(first + i);
    for (int64_t column = 0; column < size; column += 16, from += column_step) {
      __m512 x = _mm512_mul_ps(_mm512_load_ps(from), _mm512_set1_ps(factor));
      if (accumulate) x = _mm512_add_ps(x, load_values(target, offset, column, size));
      store_values(target, offset, column, size, x);
    }
  }
}

static void prepare_rows(const AttentionBackward& a, const BackwardMemory& m, const RowBlockLayout& layout,
                         const Sequence& s, int64_t head, int64_t block, int64_t index) {
  const AttentionProblem& p = a.problem;
  const int64_t group = p.N / p.G, first = block * kBackwardRows;
  const int64_t count = smaller(kBackwardRows, s.T * group - first);
  char* const memory = m.row_blocks + index * layout.bytes;
  const RowSource q = rows_from(p.q, s.batch, s.q_begin, head, group);
  const RowSource dout = rows_from(a.dout, s.batch, s.q_begin, head, group);
  const RowSource out = rows_from(a.out, s.batch, s.q_begin, head, group);
  const Range blocks = key_blocks_of(p, s, block);
  auto& bounds = *reinterpret_cast<RowBounds*>(memory + layout.bounds);
  bounds = {0.0f, 0.0f};
  m.progress[index] = static_cast<int32_t>(blocks.begin);
  if (blocks.begin == blocks.end) {
    const RowSource dq = rows_from(a.dq, s.batch, s.q_begin, head, group);
    alignas(64) const float zeros[256] = {};
    for (int64_t i = 0; i < count && !a.accumulate; ++i)
      store_tiles(zeros, 0, 0, 1, p.H, 0.0f, false, dq, first + i);
    return;
  }
  pack_right_transposed(q, first, count, kRowTiles, p.H,
                        reinterpret_cast<Bits*>(memory + layout.q_transposed));
  bool left_out =
      pack_right<false>(q, first, count, kRowTiles / 2, p.H, reinterpret_cast<Bits*>(memory + layout.q));
  pack_right_transposed(dout, first, count, kRowTiles, p.Hv,
                        reinterpret_cast<Bits*>(memory + layout.dout_transposed));
  left_out |= pack_right<false>(dout, first, count, kRowTiles / 2, p.Hv,
                                reinterpret_cast<Bits*>(memory + layout.dout));
  if (left_out) note_left_out(a.left_out);
  auto* base = reinterpret_cast<float*>(memory + layout.base);
  auto* delta = reinterpret_cast<float*>(memory + layout.delta);
  for (int64_t i = 0; i < kBackwardRows; ++i) {
    // Of a row that saw no key, and of one that is none, the probabilities become 2^-huge = 0.
    base[i] = 3e38f;
    delta[i] = 0.0f;
    if (i >= count) continue;
    const int64_t at = lse_index(p, s, head, first + i);
    if (a.lse[at] > -__builtin_inff())
      base[i] = a.lse[at] * 1.44269504088896340736f - (kShift + kProbabilityBits);
    const int64_t of_dout = dout.offset(first + i), of_out = out.offset(first + i);
    __m512 sum = _mm512_setzero_ps(), size = sum;
    for (int64_t column = 0; column < p.Hv; column += 16) {
      const __m512 x = load_values(dout, of_dout, column, p.Hv);
      sum = _mm512_fmadd_ps(x, load_values(out, of_out, column, p.Hv), sum);
      size = _mm512_add_ps(size, _mm512_abs_ps(x));
    }
    delta[i] = _mm512_reduce_add_ps(sum) - (a.dlse ? a.dlse[at] : 0.0f);
    const float row_dout = _mm512_reduce_add_ps(size), row_delta = __builtin_fabsf(delta[i]);
    // The gradients of a row that is not finite are NaN, whatever the scale; the others' keep theirs.
    if (!(row_dout < __builtin_inff() && row_delta < __builtin_inff())) continue;
    bounds.dout = larger_float(bounds.dout, row_dout);
    bounds.delta = larger_float(bounds.delta, row_delta);
  }
}

// The largest magnitude of a head's values, of those that are finite.
static float bound_values(const RowSource& v, int64_t num_keys, int64_t size) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __mmask32 unused = 0;
  __m512i most = _mm512_setzero_si512();
  for (int64_t key = 0; key < num_keys; ++key) {
    const int64_t offset = v.offset(key);
    for (int64_t column = 0; column < size; column += 32)
      most = _mm512_max_epu16(
          most, _mm512_and_si512(finite_of(load_pairs(v, offset, column, size), &unused), magnitude));
  }
  const __m512 both =
      _mm512_max_ps(widen(_mm512_castsi512_si256(most)), widen(_mm512_extracti64x4_epi64(most, 1)));
  return _mm512_reduce_max_ps(both);
}

// The power of two that a head's dS is multiplied by, from a bound of |dP - delta|: the sum of a row's |dout|
// times the largest |v|, and |delta|. 1 if that is not finite.
static float find_gradient_scale(const AttentionBackward& a, const BackwardMemory& m,
                                 const RowBlockLayout& layout, const Sequence& s, const Range& row_blocks,
                                 int64_t index, int64_t head) {
  const AttentionProblem& p = a.problem;
  if (kScoreGradientBits == 0) return 1.0f;
  RowBounds most = {0.0f, 0.0f};
  const int64_t count = row_blocks.end - row_blocks.begin, first = m.first_row_block[index] + head * count;
  for (int64_t i = first; i < first + count; ++i) {
    const auto& bounds = *reinterpret_cast<const RowBounds*>(m.row_blocks + i * layout.bytes + layout.bounds);
    most.dout = larger_float(most.dout, bounds.dout);
    most.delta = larger_float(most.delta, bounds.delta);
  }
  const float bound =
      most.dout * bound_values(rows_from(p.v, s.batch, s.k_begin, head, 1), s.S, p.Hv) + most.delta;
  if (!(bound > 0.0f && bound < __builtin_inff())) return 1.0f;
  const int64_t bits = kScoreGradientBits - 1 - __builtin_ilogbf(bound);
  return __builtin_ldexpf(1.0f, static_cast<int>(larger(-100, smaller(100, bits))));
}

// Scores and dp of 32 keys -> P^T, dS^T and dS^T with keys in pairs, times powers of two. `delta` is
// multiplied by gap_scale. `low` and `high`: per row the first and the last key that it sees, counted from
// the first of the 32.
template <bool kMasked>
static void differentiate(const BackwardTask& task, const float* base, const float* delta,
                          Bits* ds_transposed, const int32_t* low, const int32_t* high) {
  const __m512 factor = _mm512_set1_ps(task.a->problem.scale * 1.44269504088896340736f);
  const __m512 gap_scale = _mm512_set1_ps(task.gap_scale);
  for (int64_t m = 0; m < kRowTiles / 2; ++m) {
    const float* s = task.scores + 2 * m * kTileSums;
    const float* dp = task.dp + 2 * m * kTileSums;
    Bits* p_tile = task.p + m * kTileValues;
    Bits* ds_tile = task.ds + m * kTileValues;
    Bits* transposed = ds_transposed + 2 * m * kTileValues;
    for (int64_t i = 0; i < 16; ++i, s += 16, dp += 16, p_tile += 32, ds_tile += 32, transposed += 32) {
      __m512 p[2][2], ds[2][2];  // [key i, key i + 16][row tile]
#pragma GCC unroll 2
      for (int key = 0; key < 2; ++key) {
#pragma GCC unroll 2
        for (int tile = 0; tile < 2; ++tile) {
          const int64_t at = key * kRowTiles * kTileSums + tile * kTileSums;
          const int64_t row = (2 * m + tile) * 16;
          __m512 x =
              exp2_shifted(_mm512_fmsub_ps(_mm512_load_ps(s + at), factor, _mm512_load_ps(base + row)));
          const __m512 gap = _mm512_fmsub_ps(_mm512_load_ps(dp + at), gap_scale, _mm512_load_ps(delta + row));
          if (kMasked) {
            const __m512i index = _mm512_set1_epi32(static_cast<int32_t>(i + 16 * key));
            const __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_load_si512(low + row), index) &
                                   _mm512_cmple_epi32_mask(index, _mm512_load_si512(high + row));
            x = _mm512_maskz_mov_ps(seen, x);
            ds[key][tile] = _mm512_maskz_mul_ps(seen, x, gap);
          } else {
            ds[key][tile] = _mm512_mul_ps(x, gap);
          }
          p[key][tile] = x;
        }
      }
      _mm512_store_si512(p_tile, merge_pairs(p[0][0], p[0][1]));
      _mm512_store_si512(p_tile + 2 * kTileValues, merge_pairs(p[1][0], p[1][1]));
      const __m512i ds0 = merge_pairs(ds[0][0], ds[0][1]), ds1 = merge_pairs(ds[1][0], ds[1][1]);
      _mm512_store_si512(ds_tile, ds0);
      _mm512_store_si512(ds_tile + 2 * kTileValues, ds1);
      _mm512_store_si512(transposed, merge_words(ds0, _mm512_slli_epi32(ds1, 16)));
      _mm512_store_si512(transposed + kTileValues, merge_words(_mm512_srli_epi32(ds0, 16), ds1));
    }
  }
}

// Waits until dq of the rows contains all earlier blocks of keys. False if one failed.
static bool await_block(const int32_t* progress, int32_t block) {
  for (int spins = 0;; ++spins) {
    const int32_t now = __atomic_load_n(progress, __ATOMIC_ACQUIRE);
    if (now == block) return true;
    if (now < 0) return false;
    if (spins < 200) {
      _mm_pause();
    } else {
      yield_thread();  // the other thread may need this core
    }
  }
}

static void add_dq(const BackwardTask& task, int64_t block, int64_t index, int64_t key_groups) {
  const AttentionProblem& p = task.a->problem;
  const Sequence& s = *task.s;
  const int64_t group = p.N / p.G, first = block * kBackwardRows;
  int32_t* progress = task.memory->progress + index;
  auto* dq = reinterpret_cast<float*>(task.memory->row_blocks + index * task.layout->bytes + task.layout->dq);
  const Range blocks = key_blocks_of(p, s, block);
  if (!await_block(progress, static_cast<int32_t>(task.key_block))) return;
  multiply(task.h_tiles, kRowTiles, key_groups, task.k_transposed, kTileValues, task.h_tiles * kTileValues,
           task.ds_transposed, kTileValues, kRowTiles * kTileValues, dq, kTileSums, task.h_tiles * kTileSums,
           task.key_block != blocks.begin);
  if (task.key_block == blocks.end - 1) {
    for (int64_t tile = 0; tile < kRowTiles * task.h_tiles; ++tile)
      transpose_tile(reinterpret_cast<Bits*>(dq + tile * kTileSums),
                     reinterpret_cast<Bits*>(dq + tile * kTileSums));
    const int64_t count = smaller(kBackwardRows, s.T * group - first);
    store_tiles(dq, task.h_tiles * kTileSums, kTileSums, count, p.H, p.scale / task.gradient_scale,
                task.a->accumulate, rows_from(task.a->dq, s.batch, s.q_begin, task.head, group), first);
  }
  // Not a plain store: it would wipe out the mark of a thread that failed, for which the others would then
  // wait.
  auto expected = static_cast<int32_t>(task.key_block);
  __atomic_compare_exchange_n(progress, &expected, expected + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

// One block of rows against the task's keys.
static void propagate(const BackwardTask& task, int64_t block, int64_t index) {
  const AttentionProblem& p = task.a->problem;
  const Sequence& s = *task.s;
  const int64_t group = p.N / p.G, first = block * kBackwardRows, rows = s.T * group;
  const int64_t k_tiles = task.h_tiles / 2, v_tiles = task.hv_tiles / 2;
  const char* const memory = task.memory->row_blocks + index * task.layout->bytes;
  const auto* q_transposed = reinterpret_cast<const Bits*>(memory + task.layout->q_transposed);
  const auto* q = reinterpret_cast<const Bits*>(memory + task.layout->q);
  const auto* dout_transposed = reinterpret_cast<const Bits*>(memory + task.layout->dout_transposed);
  const auto* dout = reinterpret_cast<const Bits*>(memory + task.layout->dout);
  const auto* base = reinterpret_cast<const float*>(memory + task.layout->base);
  alignas(64) float delta[kBackwardRows];
  for (int64_t i = 0; i < kBackwardRows; i += 16) {
    const __m512 x = _mm512_load_ps(reinterpret_cast<const float*>(memory + task.layout->delta) + i);
    _mm512_store_ps(delta + i, _mm512_mul_ps(x, _mm512_set1_ps(task.gap_scale)));
  }
  alignas(64) int32_t low[kBackwardRows], high[kBackwardRows];
  int64_t most_low = 0, least_high = s.S, least_low = s.S, most_high = -1;
  for (int64_t i = 0; i < kBackwardRows; ++i) {
    const int64_t position = position_of(smaller(first + i, rows - 1), group);
    const Range keys = keys_seen(s, position, position);
    low[i] = static_cast<int32_t>(keys.begin - task.first_key);
    high[i] = static_cast<int32_t>(keys.end - 1 - task.first_key);
    most_low = larger(most_low, keys.begin);
    least_high = smaller(least_high, keys.end - 1);
    least_low = smaller(least_low, keys.begin);
    most_high = larger(most_high, keys.end - 1);
  }
  const int64_t groups = (task.num_keys + 31) / 32;
  for (int64_t key = 0; key < groups; ++key) {
    const int64_t begin = task.first_key + key * 32;
    Bits* transposed = task.ds_transposed + key * kRowTiles * kTileValues;
    if (begin > most_high || begin + 31 < least_low) {
      for (int64_t i = 0; i < kRowTiles * kTileValues; i += 32)
        _mm512_store_si512(transposed + i, _mm512_setzero_si512());
    } else {
      multiply(2, kRowTiles, k_tiles, task.k + 2 * key * k_tiles * kTileValues, k_tiles * kTileValues,
               kTileValues, q_transposed, k_tiles * kTileValues, kTileValues, task.scores,
               kRowTiles * kTileSums, kTileSums, false);
      multiply(2, kRowTiles, v_tiles, task.v + 2 * key * v_tiles * kTileValues, v_tiles * kTileValues,
               kTileValues, dout_transposed, v_tiles * kTileValues, kTileValues, task.dp,
               kRowTiles * kTileSums, kTileSums, false);
      if (most_low > begin || least_high < begin + 31) {
        differentiate<true>(task, base, delta, transposed, low, high);
      } else {
        differentiate<false>(task, base, delta, transposed, low, high);
      }
      multiply(2, task.hv_tiles, kRowTiles / 2, task.p, 2 * kTileValues, kTileValues, dout, kTileValues,
               task.hv_tiles * kTileValues, task.dv + 2 * key * task.hv_tiles * kTileSums,
               task.hv_tiles * kTileSums, kTileSums, true);
      multiply(2, task.h_tiles, kRowTiles / 2, task.ds, 2 * kTileValues, kTileValues, q, kTileValues,
               task.h_tiles * kTileValues, task.dk + 2 * key * task.h_tiles * kTileSums,
               task.h_tiles * kTileSums, kTileSums, true);
    }
    for (int64_t i = 0; i < kBackwardRows; ++i) {
      low[i] -= 32;
      high[i] -= 32;
    }
  }
  add_dq(task, block, index, groups);
}

static void place_scratch(BackwardTask& task) {
  const int64_t h = task.h_tiles * 16, hv = task.hv_tiles * 16;
  const int64_t bytes = kBackwardKeys * (h * (2 + 2 + 4) + hv * (2 + 4)) + 2 * 32 * kBackwardRows * (4 + 2) +
                        kBackwardKeys * kBackwardRows * 2;
  auto* memory = static_cast<char*>(thread_scratch(bytes));
  const auto take = [&memory](int64_t size) {
    char* begin = memory;
    memory += size;
    return begin;
  };
  task.k = reinterpret_cast<Bits*>(take(kBackwardKeys * h * 2));
  task.k_transposed = reinterpret_cast<Bits*>(take(kBackwardKeys * h * 2));
  task.v = reinterpret_cast<Bits*>(take(kBackwardKeys * hv * 2));
  task.dk = reinterpret_cast<float*>(take(kBackwardKeys * h * 4));
  task.dv = reinterpret_cast<float*>(take(kBackwardKeys * hv * 4));
  task.scores = reinterpret_cast<float*>(take(32 * kBackwardRows * 4));
  task.dp = reinterpret_cast<float*>(take(32 * kBackwardRows * 4));
  task.p = reinterpret_cast<Bits*>(take(32 * kBackwardRows * 2));
  task.ds = reinterpret_cast<Bits*>(take(32 * kBackwardRows * 2));
  task.ds_transposed = reinterpret_cast<Bits*>(take(kBackwardKeys * kBackwardRows * 2));
}

static void run_key_block(BackwardTask& task, int64_t sequence_index) {
  const AttentionBackward& a = *task.a;
  const AttentionProblem& p = a.problem;
  const Sequence& s = *task.s;
  place_scratch(task);
  const RowSource k = rows_from(p.k, s.batch, s.k_begin, task.head, 1);
  pack_left(k, task.first_key, task.num_keys, kKeyTiles, p.H, task.k);
  pack_left(rows_from(p.v, s.batch, s.k_begin, task.head, 1), task.first_key, task.num_keys, kKeyTiles, p.Hv,
            task.v);
  if (pack_right<false>(k, task.first_key, task.num_keys, kKeyTiles / 2, p.H, task.k_transposed))
    note_left_out(a.left_out);
  for (int64_t i = 0; i < kKeyTiles / 2 * task.h_tiles; ++i)
    transpose_tile(task.k_transposed + i * kTileValues, task.k_transposed + i * kTileValues);
  const int64_t num_sums = task.scores - task.dk;
  const float gradient_scale = task.gradient_scale;
  for (int64_t i = 0; i < num_sums; i += 16) {
    const __m512 x = task.is_first ? _mm512_setzero_ps() : _mm512_load_ps(task.sums + i);
    _mm512_store_ps(task.dk + i,
                    i < task.dv - task.dk ? _mm512_mul_ps(x, _mm512_set1_ps(gradient_scale)) : x);
  }
  const int64_t group = p.N / p.G, num_row_blocks = task.row_blocks.end - task.row_blocks.begin;
  const Range queries = queries_seeing(s, task.first_key, task.first_key + task.num_keys - 1);
  if (queries.begin < queries.end) {
    const TileScope tiles;
    const int64_t begin = larger(task.row_blocks.begin, queries.begin * group / kBackwardRows);
    const int64_t end = smaller(task.row_blocks.end, (queries.end * group - 1) / kBackwardRows + 1);
    const int64_t index = task.memory->first_row_block[sequence_index] + task.head * num_row_blocks;
    for (int64_t block = begin; block < end; ++block)
      propagate(task, block, index + block - task.row_blocks.begin);
  }
  if (!task.is_last) {
    const __m512 factor = _mm512_set1_ps(1.0f / gradient_scale);
    for (int64_t i = 0; i < num_sums; i += 16) {
      const __m512 x = _mm512_load_ps(task.dk + i);
      _mm512_store_ps(task.sums + i, i < task.dv - task.dk ? _mm512_mul_ps(x, factor) : x);
    }
    return;
  }
  store_tiles(task.dk, task.h_tiles * kTileSums, kTileSums, task.num_keys, p.H, p.scale / gradient_scale,
              a.accumulate, rows_from(a.dk, s.batch, s.k_begin, task.head, 1), task.first_key);
  store_tiles(task.dv, task.hv_tiles * kTileSums, kTileSums, task.num_keys, p.Hv,
              1.0f / (1 << kProbabilityBits), a.accumulate, rows_from(a.dv, s.batch, s.k_begin, task.head, 1),
              task.first_key);
}

// Whether this code does it. fp16 could not hold every dout in fp32.
static bool takes(const AttentionBackward& a) {
  return suits(a.problem) && a.problem.q.dtype == kHalf && !a.dbias &&
         (kHalf != kFloat16 || a.dout.dtype == kFloat16);
}

// One chunk of the rows against all keys.
static void run_chunk(const AttentionBackward& a, const Chunks& chunks, int64_t chunk) {
  const AttentionProblem& p = a.problem;
  const BackwardMemory memory(a, chunks, chunk);
  const RowBlockLayout layout(p);
  const int64_t num_sequences = count_sequences(p);
  parallel_for(memory.num_row_blocks, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = find_entry(memory.first_row_block, num_sequences, i);
      const Sequence s = sequence_of(p, index);
      const Range blocks = chunks.blocks(p, s, chunk);
      const int64_t rest = i - memory.first_row_block[index], count = blocks.end - blocks.begin;
      prepare_rows(a, memory, layout, s, rest / count, blocks.begin + rest % count, i);
    }
  });
  parallel_for(num_sequences * p.G, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence s = sequence_of(p, i / p.G);
      memory.gradient_scales[i] =
          find_gradient_scale(a, memory, layout, s, chunks.blocks(p, s, chunk), i / p.G, i % p.G);
    }
  });
  // Blocks of keys in order, and for each of them all heads, so that threads rarely meet in one head's dq.
  parallel_for(memory.num_parts, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t index = find_entry(memory.first_part, num_sequences, part);
      const Sequence s = sequence_of(p, index);
      const int64_t rest = part - memory.first_part[index], block = rest / p.G;
      const int64_t first_key = block * kBackwardKeys, num_keys = smaller(kBackwardKeys, s.S - first_key);
      const Range seeing = chunks.seeing(p, s, first_key, first_key + num_keys - 1);
      if (chunk < seeing.begin || chunk >= seeing.end) continue;
      BackwardTask task{};
      task.a = &a;
      task.s = &s;
      task.memory = &memory;
      task.layout = &layout;
      task.row_blocks = chunks.blocks(p, s, chunk);
      task.is_first = a.accumulate || chunk == seeing.begin;
      task.is_last = a.accumulate || chunk == seeing.end - 1;
      task.sums = memory.sums + part * BackwardMemory::part_floats(p);
      task.head = rest % p.G;
      task.key_block = block;
      task.first_key = first_key;
      task.num_keys = num_keys;
      task.h_tiles = round_up(p.H, 32) / 16;
      task.hv_tiles = round_up(p.Hv, 32) / 16;
      task.gradient_scale = memory.gradient_scales[index * p.G + task.head];
      task.gap_scale = task.gradient_scale / (1 << kProbabilityBits);
      try {
        run_key_block(task, index);
      } catch (...) {
        // No memory. The other threads must not wait for this one.
        for (int64_t i = 0; i < memory.num_row_blocks; ++i)
          __atomic_store_n(memory.progress + i, -1, __ATOMIC_RELEASE);
        throw;
      }
    }
  });
}

static void attention_backward(const AttentionBackward& a) {
  const Chunks chunks(a.problem);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) run_chunk(a, chunks, chunk);
}

}  // namespace half
}  // namespace pypar::PYPAR_ISA
