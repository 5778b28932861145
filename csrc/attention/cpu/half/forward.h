// Attention's forward with bf16 or fp16 products: online softmax over units of 32 rows and 128 keys.
//
// Scores are computed as [row][key], so that probabilities are a left operand as they are stored, and what
// must be transposed is K, which is packed once for all rows.
//
// Cycles of a unit for H = Hv = 64 on the one processor with AMX that was measured, 16 for a product of
// tiles: 64 products are 1024, and 256 vectors of exponentials at 8 instructions on two ports another 1024.
// Side by side they were not faster than in turn. Measured are 1010 for the scores and 1070 for the output,
// each twice its products for tiles stored and loaded again, and 1130 for the exponentials. Keys and values
// are streamed past the first cache, where the scores must stay: storing these costs a third more else.
#pragma once

#include "attention/cpu/half/tile_products.h"
#include "attention/cpu/half/tile_scheduler.h"
#include "core/parallel.h"

namespace pypar::PYPAR_ISA {
namespace half {
using namespace pypar::half;

constexpr int64_t kPanelRows = 32;
constexpr int64_t kUnitKeys = 128;
// Of one tile of rows.
constexpr int64_t kUnitSums = kUnitKeys / 16 * kTileSums;
constexpr int64_t kUnitValues = kUnitKeys / 32 * kTileValues;
constexpr int64_t kPanels = kForwardRows / kPanelRows;
constexpr float kLog2E = 1.44269504088896340736f;
// A row's reference, subtracted from its scores (in powers of two), is the largest of the first scores that
// it sees, so that the largest probability is 1, which rounding keeps. It moves only when a score exceeds it
// by more than kSlackBits; the fast path only looks whether a sum shows that.
constexpr float kSlackBits = 8.0f;
constexpr float kLargeSum = 4096.0f;

struct ForwardSizes {
  int64_t k_tiles;   // of 32 along H
  int64_t hv_tiles;  // of 16 along Hv, even
  explicit ForwardSizes(const AttentionProblem& p)
      : k_tiles(round_up(p.H, 32) / 32), hv_tiles(round_up(p.Hv, 32) / 16) {}
};

struct Panel {
  Bits* q;           // left operand [2][k_tiles]
  float* out;        // [2][hv_tiles] tiles, not normalised
  float* sums;       // [32][16], to be added up
  float* reference;  // [32]
  int32_t* low;      // [32], the first and the last key that a row sees
  int32_t* high;
  int64_t first, count;  // rows
  int64_t row_tiles;
  int64_t keys_begin, keys_end;  // that any row sees
  int64_t most_low, least_high;
  bool ready;  // every row has a sum
  bool blank;  // nothing has been added to `out`, whose content is any
};

struct Unit {
  Panel* panel;
  int64_t first_key;
  int64_t blocks;  // of 32 keys
  bool masked;
  bool rescaled;
  float* scores;  // [2][kUnitKeys / 16] tiles
  Bits* p;        // left operand [2][kUnitKeys / 32]
  float shrink[kPanelRows];
};

struct ForwardTask {
  const AttentionForward* a;
  const Sequence* sequence;
  ForwardSizes sizes;
  const Bits* k;  // packed, of the sequence and head
  const Bits* v;
  float factor;
};

// A bit for each of the keys below n, of 32.
PYPAR_INLINE uint32_t keys_below(int64_t n) {
  return _bzhi_u32(~uint32_t{0}, static_cast<uint32_t>(smaller(32, larger(0, n))));
}

// Probabilities of 8 rows by their present references. `sums` receives what they add to the rows' sums, `top`
// the largest of it.
template <bool kMasked>
PYPAR_INLINE void online_softmax_rows(const Unit& unit, float factor, int64_t first, float* sums,
                                      __m512* top) {
  const Panel& panel = *unit.panel;
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t row = first; row < first + 8; ++row) {
    const float* s = unit.scores + row / 16 * kUnitSums + row % 16 * 16;
    Bits* p = unit.p + row / 16 * kUnitValues + row % 16 * 32;
    const __m512 base = _mm512_set1_ps(panel.reference[row] - kShift);
    __m512 sum = _mm512_setzero_ps();
    int64_t low = panel.low[row] - unit.first_key, high = panel.high[row] - unit.first_key;
    for (int64_t block = 0; block < unit.blocks; ++block) {
      __m512 a = _mm512_fmsub_ps(_mm512_load_ps(s), scale, base);
      __m512 b = _mm512_fmsub_ps(_mm512_load_ps(s + kTileSums), scale, base);
      if (kMasked) {
        const uint32_t seen = keys_below(high + 1) & ~keys_below(low);
        a = exp2_shifted(static_cast<__mmask16>(seen), a);
        b = exp2_shifted(static_cast<__mmask16>(seen >> 16), b);
        low -= 32;
        high -= 32;
      } else {
        a = exp2_shifted(a);
        b = exp2_shifted(b);
      }
      store_probabilities(a, b, p);
      sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
      s += 2 * kTileSums;
      p += kTileValues;
    }
    _mm512_store_ps(sums, sum);
    sums += 16;
    *top = _mm512_max_ps(sum, *top);
  }
}

PYPAR_INLINE bool has_sum(__m512 sums) {
  return _mm512_cmp_ps_mask(sums, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
}

// The row's largest score, in powers of two, among the keys that it sees; -inf if there is none. Scores go to
// `x`, -inf where they are not seen.
template <bool kMasked>
PYPAR_INLINE float find_top(const Unit& unit, float factor, int64_t row, __m512* x) {
  const float* s = unit.scores + row / 16 * kUnitSums + row % 16 * 16;
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 top = lowest;
  int64_t low = unit.panel->low[row] - unit.first_key, high = unit.panel->high[row] - unit.first_key;
  for (int64_t j = 0; j < 2 * unit.blocks; ++j, low -= 16, high -= 16) {
    const auto seen = static_cast<__mmask16>(kMasked ? keys_below(high + 1) & ~keys_below(low) : 0xffff);
    x[j] = _mm512_mask_mul_ps(lowest, seen, _mm512_load_ps(s + j * kTileSums), _mm512_set1_ps(factor));
    top = _mm512_max_ps(top, x[j]);
  }
  return _mm512_reduce_max_ps(top);
}

// One row whose reference must move.
static void online_softmax_row(Unit& unit, float factor, int64_t row) {
  Panel& panel = *unit.panel;
  Bits* p = unit.p + row / 16 * kUnitValues + row % 16 * 32;
  __m512 x[kUnitKeys / 16];
  const float most = find_top<true>(unit, factor, row, x), old = panel.reference[row];
  __m512 sum = _mm512_load_ps(panel.sums + row * 16);
  if (most > old + kSlackBits) {
    panel.reference[row] = most;
    // The exponential's own factor is taken out again.
    const float shrink =
        _mm512_cvtss_f32(exp2_shifted(_mm512_set1_ps(old - most + kShift))) / (1.0f + kRoundUp);
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(shrink));
    unit.shrink[row] = shrink;
    unit.rescaled = true;
  }
  const __m512 base = _mm512_set1_ps(panel.reference[row] - kShift);
  for (int64_t j = 0; j < 2 * unit.blocks; ++j) {
    x[j] = exp2_shifted(_mm512_sub_ps(x[j], base));
    sum = _mm512_add_ps(sum, x[j]);
  }
  for (int64_t block = 0; block < unit.blocks; ++block) {
    store_probabilities(x[2 * block], x[2 * block + 1], p + block * kTileValues);
  }
  _mm512_store_ps(panel.sums + row * 16, sum);
}

// The largest score of the first keys that a row sees.
static void find_references(const ForwardTask& task, const Unit& unit, int64_t first) {
  Panel& panel = *unit.panel;
  __m512 x[kUnitKeys / 16];
  for (int64_t row = first; row < first + 8; ++row) {
    if (has_sum(_mm512_load_ps(panel.sums + row * 16))) continue;
    const float most =
        unit.masked ? find_top<true>(unit, task.factor, row, x) : find_top<false>(unit, task.factor, row, x);
    if (most > -__builtin_inff()) panel.reference[row] = most;
  }
}

// Scores of 8 rows -> probabilities, and their sums.
static void online_softmax(const ForwardTask& task, Unit& unit, int64_t first) {
  Panel& panel = *unit.panel;
  alignas(64) float sums[8 * 16];
  __m512 top = _mm512_setzero_ps();
  if (!panel.ready) find_references(task, unit, first);
  if (unit.masked) {
    online_softmax_rows<true>(unit, task.factor, first, sums, &top);
  } else {
    online_softmax_rows<false>(unit, task.factor, first, sums, &top);
  }
  float* const totals = panel.sums + first * 16;
  const auto large = [](__m512 x) { return _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLargeSum), _CMP_GT_OQ); };
  if (large(top) == 0) {
    for (int i = 0; i < 8 * 16; i += 16)
      _mm512_store_ps(totals + i, _mm512_add_ps(_mm512_load_ps(totals + i), _mm512_load_ps(sums + i)));
    return;
  }
  // Each row for itself: its bits must not depend on its neighbours.
  for (int i = 0; i < 8; ++i) {
    const __m512 sum = _mm512_load_ps(sums + i * 16), total = _mm512_load_ps(totals + i * 16);
    if (large(sum) != 0) online_softmax_row(unit, task.factor, first + i);
    if (large(sum) == 0) _mm512_store_ps(totals + i * 16, _mm512_add_ps(total, sum));
  }
}

static void check_ready(Panel& panel) {
  panel.ready = true;
  for (int64_t i = 0; i < panel.row_tiles * 16; ++i)
    panel.ready &= has_sum(_mm512_load_ps(panel.sums + i * 16));
}

// Scores of the unit's 32 keys from 32 * block on.
PYPAR_INLINE void score(const ForwardTask& task, const Unit& unit, int64_t block) {
  const int64_t panel_step = task.sizes.k_tiles * kTileValues;
  const Bits* k = task.k + (unit.first_key / 16 + 2 * block) * panel_step;
  float* s = unit.scores + 2 * block * kTileSums;
#if defined(__AMX_BF16__)
  if (unit.panel->row_tiles == 2 && task.sizes.k_tiles == 2) {
    multiply_held_tiles(2, k, s, kUnitSums);
    return;
  }
#endif
  if (unit.panel->row_tiles == 2) {
    multiply_tiles<2, 2>(task.sizes.k_tiles, unit.panel->q, panel_step, kTileValues, k, panel_step,
                         kTileValues, s, kUnitSums, kTileSums, false);
  } else {
    multiply_tiles<1, 2>(task.sizes.k_tiles, unit.panel->q, panel_step, kTileValues, k, panel_step,
                         kTileValues, s, kUnitSums, kTileSums, false);
  }
}

static void rescale(const ForwardTask& task, const Unit& unit) {
  for (int64_t index = 0; index < unit.panel->row_tiles * 16; ++index) {
    if (unit.shrink[index] == 1.0f) continue;
    const __m512 shrink = _mm512_set1_ps(unit.shrink[index]);
    float* out = unit.panel->out + index / 16 * task.sizes.hv_tiles * kTileSums + index % 16 * 16;
    for (int64_t j = 0; j < task.sizes.hv_tiles; ++j, out += kTileSums) {
      _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), shrink));
    }
  }
}

// Columns 16 * column to 16 * column + 32 of the output.
PYPAR_INLINE void weigh(const ForwardTask& task, const Unit& unit, int64_t column) {
  const int64_t hv_tiles = task.sizes.hv_tiles;
  const Bits* v = task.v + (unit.first_key / 32 * hv_tiles + column) * kTileValues;
  float* out = unit.panel->out + column * kTileSums;
  if (unit.panel->row_tiles == 2) {
    multiply_tiles<2, 2>(unit.blocks, unit.p, kUnitValues, kTileValues, v, kTileValues,
                         hv_tiles * kTileValues, out, hv_tiles * kTileSums, kTileSums, !unit.panel->blank);
  } else {
    multiply_tiles<1, 2>(unit.blocks, unit.p, kUnitValues, kTileValues, v, kTileValues,
                         hv_tiles * kTileValues, out, hv_tiles * kTileSums, kTileSums, !unit.panel->blank);
  }
}

static void run_unit(const ForwardTask& task, Unit& unit) {
#if defined(__AMX_BF16__)
  if (unit.panel->row_tiles == 2 && task.sizes.k_tiles == 2) hold_tiles(unit.panel->q);
#endif
  for (int64_t block = 0; block < unit.blocks; ++block) score(task, unit, block);
  for (int64_t row = 0; row < 16 * unit.panel->row_tiles; row += 8) online_softmax(task, unit, row);
  if (!unit.panel->ready) check_ready(*unit.panel);
  if (unit.rescaled) rescale(task, unit);
  for (int64_t column = 0; column < task.sizes.hv_tiles; column += 2) weigh(task, unit, column);
  unit.panel->blank = false;
}

struct UnitList {
  Panel* panels;
  int64_t num_panels;
  int64_t key, end;  // of the block of keys
  int64_t panel;

  // The next unit into `unit`; false if there is none.
  bool next(Unit& unit) {
    for (; key < end; key += kUnitKeys, panel = 0) {
      while (panel < num_panels) {
        Panel& candidate = panels[panel++];
        const int64_t begin = larger(key, candidate.keys_begin / 32 * 32);
        const int64_t stop = smaller(key + kUnitKeys, candidate.keys_end);
        if (begin >= stop) continue;
        unit.panel = &candidate;
        unit.first_key = begin;
        unit.blocks = (stop - begin + 31) / 32;
        unit.masked = candidate.most_low > begin || candidate.least_high < begin + unit.blocks * 32 - 1;
        unit.rescaled = false;
        for (int64_t i = 0; i < kPanelRows; i += 16) _mm512_storeu_ps(unit.shrink + i, _mm512_set1_ps(1.0f));
        return true;
      }
    }
    return false;
  }
};

static void clear(float* begin, const float* end) {
  for (float* x = begin; x < end; x += 16) _mm512_store_ps(x, _mm512_setzero_ps());
}

static void begin_panel(const ForwardTask& task, int64_t head, int64_t first, int64_t rows, char* memory,
                        Panel* panel) {
  const AttentionProblem& p = task.a->problem;
  const Sequence& s = *task.sequence;
  const int64_t group = p.N / p.G;
  panel->q = reinterpret_cast<Bits*>(memory);
  panel->out = reinterpret_cast<float*>(panel->q + 2 * task.sizes.k_tiles * kTileValues);
  panel->sums = panel->out + 2 * task.sizes.hv_tiles * kTileSums;
  panel->reference = panel->sums + kPanelRows * 16;
  panel->low = reinterpret_cast<int32_t*>(panel->reference + kPanelRows);
  panel->high = panel->low + kPanelRows;
  panel->first = first;
  panel->count = smaller(kPanelRows, rows - first);
  panel->row_tiles = (panel->count + 15) / 16;
  panel->most_low = panel->keys_end = 0;
  panel->least_high = panel->keys_begin = s.S;
  panel->ready = false;
  pack_left(rows_from(p.q, s.batch, s.q_begin, head, group), first, panel->count, panel->row_tiles, p.H,
            panel->q);
  panel->blank = !task.a->carry;
  if (task.a->carry) clear(panel->out, panel->sums);
  clear(panel->sums, panel->reference);
  for (int64_t i = 0; i < kPanelRows; ++i) {
    const int64_t row = first + smaller(i, panel->count - 1);
    const int64_t position = position_of(row, group);
    const Range keys = keys_seen(s, position, position);
    panel->reference[i] = 0.0f;
    panel->low[i] = static_cast<int32_t>(keys.begin);
    panel->high[i] = static_cast<int32_t>(keys.end - 1);
    panel->most_low = larger(panel->most_low, keys.begin);
    panel->least_high = smaller(panel->least_high, keys.end - 1);
    if (keys.begin < keys.end) {
      panel->keys_begin = smaller(panel->keys_begin, keys.begin);
      panel->keys_end = larger(panel->keys_end, keys.end);
    }
    if (!task.a->carry || i >= panel->count) continue;
    const float lse = task.a->lse[lse_index(p, s, head, row)];
    if (lse == -__builtin_inff()) continue;
    panel->reference[i] = lse * kLog2E;
    panel->sums[i * 16] = 1.0f + kRoundUp;
    const RowSource out = rows_from(task.a->out, s.batch, s.q_begin, head, group);
    const int64_t offset = out.offset(row);
    float* to = panel->out + i / 16 * task.sizes.hv_tiles * kTileSums + i % 16 * 16;
    for (int64_t column = 0; column < p.Hv; column += 16, to += kTileSums)
      _mm512_store_ps(to, load_values(out, offset, column, p.Hv));
  }
}

// Of 8 sums; of 0 it is -inf. A series in z, at most 0.172, of 2 atanh(z) / ln 2, without what is below
// 2e-12.
static __m512d log2_of(__m512d x) {
  const __m512d m = _mm512_getmant_pd(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const __m512d middle = _mm512_set1_pd(1.4142135623730951);
  const __m512d z = _mm512_div_pd(_mm512_sub_pd(m, middle), _mm512_add_pd(m, middle));
  const __m512d z2 = _mm512_mul_pd(z, z);
  __m512d sum = _mm512_set1_pd(1.0 / 13);
  for (double odd = 11; odd > 0; odd -= 2) sum = _mm512_fmadd_pd(sum, z2, _mm512_set1_pd(1.0 / odd));
  sum = _mm512_mul_pd(_mm512_mul_pd(sum, z), _mm512_set1_pd(2.8853900817779268));
  return _mm512_add_pd(_mm512_add_pd(_mm512_getexp_pd(x), _mm512_set1_pd(0.5)), sum);
}

// (references + log2(sums)) * ln 2, of 16 rows.
static void find_lse(__m512 references, __m512 sums, float* lse) {
  for (int half = 0; half < 2; ++half) {
    const __m512d sum =
        _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(sums, 1) : _mm512_castps512_ps256(sums));
    const __m512d reference =
        _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(references, 1) : _mm512_castps512_ps256(references));
    const __m512d x =
        _mm512_mul_pd(_mm512_add_pd(reference, log2_of(sum)), _mm512_set1_pd(0.6931471805599453));
    _mm256_storeu_ps(lse + 8 * half, _mm512_cvtpd_ps(x));
  }
}

// What 16 rows' outputs are multiplied by, from their sums; and their lse.
static void finalize_rows(const ForwardTask& task, int64_t head, const Panel& panel, int64_t first,
                          float* factors) {
  const AttentionProblem& p = task.a->problem;
  const int64_t group = p.N / p.G;
  alignas(64) float by_lane[256], sums[16], row_lse[16];
  transpose_tile(reinterpret_cast<const Bits*>(panel.sums + first * 16), reinterpret_cast<Bits*>(by_lane));
  __m512 sum = _mm512_load_ps(by_lane);
  for (int i = 16; i < 256; i += 16) sum = _mm512_add_ps(sum, _mm512_load_ps(by_lane + i));
  sum = _mm512_div_ps(sum, _mm512_set1_ps(1.0f + kRoundUp));
  const __mmask16 some = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  _mm512_store_ps(sums, sum);
  _mm512_store_ps(factors, _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), sum));
  find_lse(_mm512_loadu_ps(panel.reference + first), sum, row_lse);
  for (int64_t i = 0; i < smaller(16, panel.count - first); ++i) {
    const int64_t row = panel.first + first + i;
    float& lse = task.a->lse[lse_index(p, *task.sequence, head, row)];
    if (p.sinks) {
      const double reference = panel.reference[first + i];
      const double sink = static_cast<double>(p.sinks[head * group + row % group]) * 1.4426950408889634;
      const double top = sums[i] != 0.0f && !(sink > reference) ? reference : sink;
      const double weight = __builtin_exp2(reference - top);
      const double total = sums[i] != 0.0f ? sums[i] * weight + __builtin_exp2(sink - top) : 1.0;
      factors[i] = static_cast<float>(sums[i] != 0.0f ? weight / total : 0.0);
      lse = static_cast<float>((top + __builtin_log2(total)) * 0.6931471805599453);
      continue;
    }
    lse = row_lse[i];
  }
}

static void end_panel(const ForwardTask& task, int64_t head, const Panel& panel) {
  const AttentionProblem& p = task.a->problem;
  const Sequence& s = *task.sequence;
  const RowSource target = rows_from(task.a->out, s.batch, s.q_begin, head, p.N / p.G);
  if (panel.blank) clear(panel.out, panel.sums);
  alignas(64) float factors[kPanelRows];
  for (int64_t first = 0; first < panel.count; first += 16) {
    finalize_rows(task, head, panel, first, factors + first);
  }
  for (int64_t i = 0; i < panel.count; ++i) {
    const __m512 factor = _mm512_set1_ps(factors[i]);
    const float* from = panel.out + i / 16 * task.sizes.hv_tiles * kTileSums + i % 16 * 16;
    const int64_t offset = target.offset(panel.first + i);
    for (int64_t column = 0; column < p.Hv; column += 32, from += 2 * kTileSums) {
      const __m512 a = _mm512_mul_ps(_mm512_load_ps(from), factor);
      const __m512 b = _mm512_mul_ps(_mm512_load_ps(from + kTileSums), factor);
      store_two(target, offset, column, p.Hv, a, b);
    }
  }
}

static int64_t panel_bytes(const ForwardSizes& sizes) {
  return 2 * (sizes.k_tiles + sizes.hv_tiles) * 1024 + kPanelRows * (64 + 12);
}

// One block of kForwardRows rows of one head.
static void attend(const ForwardTask& task, int64_t head, int64_t block) {
  const AttentionProblem& p = task.a->problem;
  const int64_t rows = task.sequence->T * (p.N / p.G);
  auto* memory = static_cast<char*>(
      thread_scratch(kPanelRows * kUnitKeys * (4 + 2) + kPanels * panel_bytes(task.sizes)));
  Unit unit;
  unit.scores = reinterpret_cast<float*>(memory);
  unit.p = reinterpret_cast<Bits*>(memory + kPanelRows * kUnitKeys * 4);
  Panel panels[kPanels];
  char* panel_memory = memory + kPanelRows * kUnitKeys * (4 + 2);
  UnitList list{panels, 0, task.sequence->S, 0, 0};
  for (int64_t first = block * kForwardRows; first < smaller(rows, (block + 1) * kForwardRows);
       first += kPanelRows, panel_memory += panel_bytes(task.sizes)) {
    Panel& panel = panels[list.num_panels++];
    begin_panel(task, head, first, rows, panel_memory, &panel);
    list.key = smaller(list.key, panel.keys_begin / kUnitKeys * kUnitKeys);
    list.end = larger(list.end, panel.keys_end);
  }
  const TileScope tiles;
  while (list.next(unit)) run_unit(task, unit);
  for (int64_t i = 0; i < list.num_panels; ++i) end_panel(task, head, panels[i]);
}

static bool takes(const AttentionForward& a) { return suits(a.problem) && a.problem.q.dtype == kHalf; }

static void attention_forward(const AttentionForward& a) {
  const AttentionProblem& p = a.problem;
  const ForwardSizes sizes(p);
  const ForwardMemory memory(p, a.memory);
  const int64_t group = p.N / p.G;
  constexpr int64_t kPiece = 8;  // blocks of 32 of the keys and values, which are packed once
  parallel_for(memory.total_blocks * p.G, kPiece, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / memory.total_blocks, block = i % memory.total_blocks;
      const int64_t index = memory.sequence_of_block(p, block);
      const Sequence s = sequence_of(p, index);
      const int64_t first = (block - first_key_block(p, s)) * 32;
      if (first >= s.S) continue;
      const int64_t count = smaller(32, s.S - first);
      pack_right_transposed(rows_from(p.k, s.batch, s.k_begin, head, 1), first, count, 2, p.H,
                            static_cast<Bits*>(memory.k) + i * 32 * sizes.k_tiles * 32);
      auto* const values = static_cast<Bits*>(memory.v) + i * 32 * sizes.hv_tiles * 16;
      if (pack_right<kNeighbours>(rows_from(p.v, s.batch, s.k_begin, head, 1), first, count, 1, p.Hv, values))
        note_left_out(a.left_out);
    }
  });
  const int64_t num_sequences = count_sequences(p);
  int64_t num_parts = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    memory.first_part[i] = num_parts;
    num_parts += blocks_of(sequence_of(p, i).T * group, kForwardRows) * p.G;
  }
  parallel_for(num_parts, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t index = find_entry(memory.first_part, num_sequences, part);
      const Sequence s = sequence_of(p, index);
      const int64_t rest = part - memory.first_part[index];
      const int64_t blocks = blocks_of(s.T * group, kForwardRows);
      const int64_t head = rest % p.G, first = head * memory.total_blocks + first_key_block(p, s);
      const ForwardTask task{&a,
                             &s,
                             sizes,
                             static_cast<const Bits*>(memory.k) + first * 32 * sizes.k_tiles * 32,
                             static_cast<const Bits*>(memory.v) + first * 32 * sizes.hv_tiles * 16,
                             p.scale * kLog2E};
      // The last rows see the most keys under a causal mask: they come first.
      attend(task, head, blocks - 1 - rest / p.G);
    }
  });
}

}  // namespace half
}  // namespace pypar::PYPAR_ISA
