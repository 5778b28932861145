// One update of AdamW over many tensors in one pass: contract and definition in pypar/ops/adamw/.
#include "core/registry.h"

namespace pypar {

struct AdamwTensor {
  void* param;            // [count], written; read too where there is no master
  const void* gradient;   // [count]
  float* master;          // [count] or null
  void* exp_avg;          // [count]
  void* exp_avg_sq;       // [count]
  float* exp_avg_absmax;  // [ceil(count / 256)] or null: of moments in 8 bits
  float* exp_avg_sq_absmax;
  int64_t count;
  int64_t first, run, stride;  // element i is number first + i / run * stride + i % run of the whole
  int64_t first_chunk;         // chunks of the tensors before this one
};

struct Adamw {
  const AdamwTensor* tensors;
  int64_t num_tensors, num_chunks;
  const float* found_inf;  // null, or nothing is done where it is not 0
  const float* scale;      // null, or one more factor of the gradients
  const float* values[2];  // of moments in 8 bits: the 256 values, signed and unsigned
  const float* lines[2];   // and the slopes and offsets of the 7 lines that encode
  float factor, decay, rest1, beta1, beta2, rest2, step_size, root_factor, eps;
  uint64_t key;
  int param_type, gradient_type, moment_type, stochastic, near_zero, num_threads;
};

PYPAR_KERNEL(adamw, Adamw)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/rows.h"

namespace pypar::PYPAR_ISA {

constexpr int kEightBits = 3;  // a moment_type beside the element types
constexpr int64_t kBlock = 256;
constexpr int kLines = 7;
static_assert(kChunkElements % kBlock == 0, "a chunk is whole blocks");

// ---- random numbers: 32 bits an element, from its number in the whole

PYPAR_INLINE uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The keys of the 2^32 elements whose numbers have the same upper half as this one.
struct Keys {
  uint32_t first, second;
};

PYPAR_INLINE Keys keys_of(uint64_t key, uint64_t number) {
  const uint64_t here = mixed(key + (number >> 32));
  return {static_cast<uint32_t>(here), static_cast<uint32_t>(here >> 32)};
}

PYPAR_INLINE UInt random_vector(Keys keys, UInt low) {
  UInt x = low ^ keys.first;
  x = (x ^ (x >> 16)) * 0x21f0aaadu + keys.second;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

static void random_words(uint32_t* out, uint64_t key, uint64_t number, int64_t count) {
  const UInt lanes = reinterpret_cast<UInt>(lane_indices());
  while (count > 0) {
    const Keys keys = keys_of(key, number);
    const auto low = static_cast<uint32_t>(number);
    const int64_t piece = smaller(count, static_cast<int64_t>((uint64_t{1} << 32) - low));
    for (int64_t i = 0; i < piece; i += kWidth) {
      const UInt x = random_vector(keys, lanes + (low + static_cast<uint32_t>(i)));
      std::memcpy(out + i, &x, sizeof(x));  // `out` has room for a vector more
    }
    out += piece, number += static_cast<uint64_t>(piece), count -= piece;
  }
}

// Those of the elements from `at` on.
static void random_words_of(const AdamwTensor& t, uint64_t key, int64_t at, int64_t count, uint32_t* out) {
  while (count > 0) {
    const int64_t row = at / t.run, column = at % t.run;
    const int64_t piece = smaller(count, t.run - column);
    random_words(out, key, static_cast<uint64_t>(t.first + row * t.stride + column), piece);
    out += piece, at += piece, count -= piece;
  }
}

// ---- storage

// What is added to the bits of a number whose upper 16 are kept, to round to nearest, ties to even.
PYPAR_INLINE UInt to_nearest(Float x) { return ((reinterpret_cast<UInt>(x) >> 16) & 1) + 0x7fff; }

// bits + 0x7fff + the last bit that is kept rounds to nearest; bits + a random number below 2^16 rounds up
// with the probability that keeps the mean. Unlike simd.h's store it keeps subnormal numbers on every
// processor.
PYPAR_INLINE void store_bfloat16(BFloat16* out, Float value, int64_t n, const uint32_t* random, int shift) {
  const UInt bits = reinterpret_cast<UInt>(value);
  UInt added = to_nearest(value);
  if (random != nullptr) {
    std::memcpy(&added, random, sizeof(added));
    added = (added >> shift) & 0xffff;
  }
  const UInt rounded = value != value ? UInt{} + 0x7fc0 : (bits + added) >> 16;
  const UShort narrow = __builtin_convertvector(rounded, UShort);
  std::memcpy(out, &narrow, static_cast<size_t>(n) * sizeof(BFloat16));
}

template <class Source, class Target>
static void convert(Target* out, const Source* x, int64_t count) {
  for_vectors(count, [&](int64_t i, int64_t n)
                         PYPAR_INLINE_LAMBDA { store_first(out + i, load_first(x + i, n), n); });
}

// The elements of x from `at` on: fp16's converted to fp32 in `room`, others where they are.
PYPAR_INLINE void* opened(int type, void* x, int64_t at, int64_t count, float* room) {
  if (type == kFloat32) return static_cast<float*>(x) + at;
  if (type == kBFloat16) return static_cast<BFloat16*>(x) + at;
  convert(room, static_cast<const Float16*>(x) + at, count);
  return room;
}

PYPAR_INLINE void closed(int type, void* x, int64_t at, int64_t count, const float* room) {
  if (type == kFloat16) convert(static_cast<Float16*>(x) + at, room, count);
}

static void decode(const uint8_t* codes, float absmax, const float* values, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (int lane = 0; lane < kWidth; ++lane) out[i + lane] = values[codes[i + lane]] * absmax;  // unrolled
  }
  for (; i < count; ++i) out[i] = values[codes[i]] * absmax;
}

// Codes of a block, and the largest of its absolute values, NaN where there is one.
template <bool is_signed>
static float encode(const float* x, const float* lines, int64_t count, uint8_t* codes) {
  Float largest = zero();
  Int missing = Int{};
  for_vectors(count, [&](int64_t i, int64_t n) PYPAR_INLINE_LAMBDA {
    const Float value = load_first(x + i, n);
    largest = max(as_float(as_int(value) & 0x7fffffff), largest);
    missing |= value != value;
  });
  const float absmax = any(missing) ? __builtin_nanf("") : reduce_max(largest);
  const Float divisor = broadcast(absmax == 0.0f ? 1.0f : absmax);
  alignas(64) int32_t wide[kBlock];
  Float slopes[kLines], offsets[kLines];  // the negatives, as there is a max and no min
  for (int line = 0; line < kLines; ++line) {
    slopes[line] = broadcast(-lines[line]);
    offsets[line] = broadcast(-lines[kLines + line]);
  }
  for_vectors(count, [&](int64_t i, int64_t n) PYPAR_INLINE_LAMBDA {
    const Float value = load_first(x + i, n);
    Float part = as_float(as_int(value) & 0x7fffffff) / divisor;
    part = select(part <= 1.0f, part, zero());
    Float level = rounded(part * slopes[0]) + offsets[0];
    for (int line = 1; line < kLines; ++line)
      level = max(rounded(part * slopes[line]) + offsets[line], level);
    Int code = __builtin_convertvector(-level, Int);
    if (is_signed) {
      const Int below = 127 - (code > 127 ? broadcast_int(127) : code);
      code = value < 0.0f ? below : code + 127;
    } else {
      code = ((value > 0.0f) & (code < 2)) ? broadcast_int(1) : code - 1;
    }
    std::memcpy(wide + i, &code, sizeof(code));
  });
  // In a loop of its own, which compilers make vectors of; they convert one vector to bytes lane by lane.
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
  return absmax;
}

// ---- the update

// What a block of at most 256 elements is, in fp32 or bf16.
struct Block {
  const void* gradients;
  void *params, *ms, *vs;  // read and written
  BFloat16* copies;        // of the parameters, written, or null
  const uint32_t* random;  // or null
  int64_t count;
};

PYPAR_INLINE void store_rounded(float* p, Float x, int64_t n, const uint32_t*, int) { store_first(p, x, n); }
PYPAR_INLINE void store_rounded(BFloat16* p, Float x, int64_t n, const uint32_t* random, int shift) {
  store_bfloat16(p, x, n, random, shift);
}

struct Updated {
  Float p, m, v;
};

// Every product is rounded before it is added: fused multiply-add is not on every processor, and a tail,
// another instruction set and plain PyTorch give the same bits.
PYPAR_INLINE Updated updated(const Adamw& a, float factor, Float gradient, Float p, Float m, Float v) {
  const Int near_zero = broadcast_int(a.near_zero ? -1 : 0);
  const float share = a.near_zero ? a.rest1 : -a.beta1;
  const Float g = rounded(gradient * factor);
  m = select(near_zero, m, g) + rounded((g - m) * share);
  v = rounded(v * a.beta2) + rounded(rounded(g * a.rest2) * g);
  const Float root = rounded(sqrt(v) * a.root_factor) + a.eps;
  return {rounded(p * a.decay) - rounded(m * a.step_size) / root, m, v};
}

template <class Gradient, class Param, class Moment, bool has_copies, bool is_random>
static void update(const Adamw& constants, float factor, const Block& block) {
  const Adamw a = constants;  // a copy that nobody else writes, so that its numbers stay in registers
  const auto* gradients = static_cast<const Gradient*>(block.gradients);
  auto* params = static_cast<Param*>(block.params);
  auto *ms = static_cast<Moment*>(block.ms), *vs = static_cast<Moment*>(block.vs);
  for_vectors(block.count, [&](int64_t i, int64_t n) PYPAR_INLINE_LAMBDA {
    const uint32_t* random = is_random ? block.random + i : nullptr;
    const Updated x = updated(a, factor, load_first(gradients + i, n), load_first(params + i, n),
                              load_first(ms + i, n), load_first(vs + i, n));
    store_rounded(ms + i, x.m, n, nullptr, 0);
    store_rounded(vs + i, x.v, n, random, 16);
    store_rounded(params + i, x.p, n, random, 0);
    if (has_copies) store_bfloat16(block.copies + i, x.p, n, nullptr, 0);
  });
}

// ---- the update where all is in bf16: 2 x kWidth elements at once, those at even places and those at odd
// ones, which need no instruction that moves them to other lanes

// Rounded as store_bfloat16 does it. A number that is missing needs no care: those in bf16, and those that
// arithmetic makes, end in 16 zeros, so that nothing is carried into the sign.
PYPAR_INLINE void store_pair(BFloat16* p, Float even, Float odd, UInt even_added, UInt odd_added) {
  const UInt low = (reinterpret_cast<UInt>(even) + even_added) >> 16;
  const UInt both = low | ((reinterpret_cast<UInt>(odd) + odd_added) & 0xffff0000u);
  std::memcpy(p, &both, sizeof(both));
}

template <bool is_random>
PYPAR_INLINE void update_pair(const Adamw& a, float factor, Keys keys, UInt low, const BFloat16* gradients,
                              BFloat16* params, BFloat16* ms, BFloat16* vs) {
  const Pair g = load_pairs(gradients), p = load_pairs(params), m = load_pairs(ms), v = load_pairs(vs);
  const Updated even = updated(a, factor, g.even, p.even, m.even, v.even);
  const Updated odd = updated(a, factor, g.odd, p.odd, m.odd, v.odd);
  store_pair(ms, even.m, odd.m, to_nearest(even.m), to_nearest(odd.m));
  if (is_random) {
    const UInt first = random_vector(keys, low), second = random_vector(keys, low + 1);
    store_pair(vs, even.v, odd.v, first >> 16, second >> 16);
    store_pair(params, even.p, odd.p, first & 0xffff, second & 0xffff);
  } else {
    store_pair(vs, even.v, odd.v, to_nearest(even.v), to_nearest(odd.v));
    store_pair(params, even.p, odd.p, to_nearest(even.p), to_nearest(odd.p));
  }
}

// `number`: the first element's, of elements that all have the same keys.
template <bool is_random>
static void update_pairs(const Adamw& constants, float factor, uint64_t number, const Block& block) {
  const Adamw a = constants;
  const auto* gradients = static_cast<const BFloat16*>(block.gradients);
  auto *params = static_cast<BFloat16*>(block.params), *ms = static_cast<BFloat16*>(block.ms),
       *vs = static_cast<BFloat16*>(block.vs);
  const Keys keys = is_random ? keys_of(a.key, number) : Keys{};
  const UInt lanes = reinterpret_cast<UInt>(lane_indices());
  UInt low = lanes * 2 + static_cast<uint32_t>(number);
  int64_t i = 0;
  for (; i + 2 * kWidth <= block.count; i += 2 * kWidth, low += 2 * kWidth)
    update_pair<is_random>(a, factor, keys, low, gradients + i, params + i, ms + i, vs + i);
  if (i == block.count) return;
  BFloat16 rest[4][2 * kWidth] = {};
  const auto bytes = static_cast<size_t>(block.count - i) * sizeof(BFloat16);
  std::memcpy(rest[0], gradients + i, bytes);
  std::memcpy(rest[1], params + i, bytes);
  std::memcpy(rest[2], ms + i, bytes);
  std::memcpy(rest[3], vs + i, bytes);
  update_pair<is_random>(a, factor, keys, low, rest[0], rest[1], rest[2], rest[3]);
  std::memcpy(params + i, rest[1], bytes);
  std::memcpy(ms + i, rest[2], bytes);
  std::memcpy(vs + i, rest[3], bytes);
}

// ---- a block by the types of its tensors

template <class Gradient, class Param, class Moment>
static void update_as(const Adamw& a, float factor, const Block& block) {
  if (block.random != nullptr) {
    if (block.copies != nullptr) return update<Gradient, Param, Moment, true, true>(a, factor, block);
    return update<Gradient, Param, Moment, false, true>(a, factor, block);
  }
  if (block.copies != nullptr) return update<Gradient, Param, Moment, true, false>(a, factor, block);
  update<Gradient, Param, Moment, false, false>(a, factor, block);
}

// Calls run(element) with a value of the C++ type that holds `type`: fp16 is opened as fp32.
template <class Run>
PYPAR_INLINE void by_opened_type(int type, const Run& run) {
  if (type == kBFloat16) {
    run(BFloat16{});
  } else {
    run(float{});
  }
}

static void update_block(const Adamw& a, float factor, const AdamwTensor& t, int64_t at, int64_t count) {
  alignas(64) float rooms[4][kBlock];
  alignas(64) uint32_t words[kBlock + kWidth];
  const int param_type = t.master != nullptr ? kFloat32 : a.param_type;
  const bool in_blocks = a.moment_type == kEightBits;
  const bool keeps_copies = t.master != nullptr && a.param_type == kBFloat16;
  Block block;
  block.count = count;
  block.gradients = opened(a.gradient_type, const_cast<void*>(t.gradient), at, count, rooms[0]);
  block.params = opened(param_type, t.master != nullptr ? t.master : t.param, at, count, rooms[1]);
  block.copies = keeps_copies ? static_cast<BFloat16*>(t.param) + at : nullptr;
  if (a.gradient_type == kBFloat16 && a.moment_type == kBFloat16 && param_type == kBFloat16) {
    block.ms = static_cast<BFloat16*>(t.exp_avg) + at, block.vs = static_cast<BFloat16*>(t.exp_avg_sq) + at;
    const auto number = static_cast<uint64_t>(t.first + at / t.run * t.stride + at % t.run);
    if (!a.stochastic) return update_pairs<false>(a, factor, number, block);
    const bool is_one_piece = at % t.run + count <= t.run && (number + count - 1) >> 32 == number >> 32;
    if (is_one_piece) return update_pairs<true>(a, factor, number, block);
  }
  block.random = a.stochastic ? words : nullptr;
  if (a.stochastic) random_words_of(t, a.key, at, count, words);
  if (in_blocks) {
    block.ms = rooms[2], block.vs = rooms[3];
    decode(static_cast<uint8_t*>(t.exp_avg) + at, t.exp_avg_absmax[at / kBlock], a.values[0], count,
           rooms[2]);
    decode(static_cast<uint8_t*>(t.exp_avg_sq) + at, t.exp_avg_sq_absmax[at / kBlock], a.values[1], count,
           rooms[3]);
  } else {
    block.ms = opened(a.moment_type, t.exp_avg, at, count, rooms[2]);
    block.vs = opened(a.moment_type, t.exp_avg_sq, at, count, rooms[3]);
  }
  by_opened_type(a.gradient_type, [&](auto gradient) {
    by_opened_type(param_type, [&](auto param) {
      by_opened_type(a.moment_type, [&](auto moment) {
        update_as<decltype(gradient), decltype(param), decltype(moment)>(a, factor, block);
      });
    });
  });
  if (in_blocks) {
    t.exp_avg_absmax[at / kBlock] =
        encode<true>(rooms[2], a.lines[0], count, static_cast<uint8_t*>(t.exp_avg) + at);
    t.exp_avg_sq_absmax[at / kBlock] =
        encode<false>(rooms[3], a.lines[1], count, static_cast<uint8_t*>(t.exp_avg_sq) + at);
  } else {
    closed(a.moment_type, t.exp_avg, at, count, rooms[2]);
    closed(a.moment_type, t.exp_avg_sq, at, count, rooms[3]);
  }
  if (t.master != nullptr && a.param_type == kFloat16) {
    convert(static_cast<Float16*>(t.param) + at, t.master + at, count);
  } else if (t.master != nullptr && a.param_type == kFloat32) {
    std::memcpy(static_cast<float*>(t.param) + at, t.master + at, static_cast<size_t>(count) * sizeof(float));
  } else if (t.master == nullptr) {
    closed(a.param_type, t.param, at, count, rooms[1]);
  }
}

void adamw(const Adamw& a) {
  if (a.found_inf != nullptr && *a.found_inf != 0.0f) return;
  const float factor = a.scale != nullptr ? a.factor * *a.scale : a.factor;
  // Only what is converted in between, and random numbers, need blocks: they have room for no more.
  const bool is_direct = a.gradient_type != kFloat16 && a.param_type != kFloat16 &&
                         (a.moment_type == kFloat32 || a.moment_type == kBFloat16) && !a.stochastic;
  const int64_t step = is_direct ? kChunkElements : kBlock;
  parallel_for(a.num_chunks, 1, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t low = 0, high = a.num_tensors;  // the last tensor that begins at this chunk or before it
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (a.tensors[middle].first_chunk <= chunk ? low : high) = middle;
      }
      const AdamwTensor& t = a.tensors[low];
      const int64_t from = (chunk - t.first_chunk) * kChunkElements;
      const int64_t to = smaller(t.count, from + kChunkElements);
      for (int64_t at = from; at < to; at += step) {
        update_block(a, factor, t, at, smaller(step, to - at));
      }
    }
  });
}

}  // namespace pypar::PYPAR_ISA

#else

#  include <pybind11/stl.h>

#  include <optional>
#  include <vector>

// One of a column's addresses; a column that is not given has none.
template <class Element>
static Element* address(const std::vector<uintptr_t>& column, size_t i) {
  return column.empty() ? nullptr : reinterpret_cast<Element*>(column[i]);
}

PYPAR_BIND(adamw) {
  using Column = std::vector<uintptr_t>;
  module.def("adamw", [](const std::vector<Column>& columns, const std::vector<int64_t>& counts,
                         const std::vector<int64_t>& places,
                         const std::vector<std::optional<uintptr_t> >& once,
                         const std::vector<float>& numbers, uint64_t key, const std::vector<int>& kinds) {
    constexpr int64_t kChunk = 32768;  // kChunkElements of core/rows.h
    std::vector<pypar::AdamwTensor> tensors;
    int64_t chunks = 0;
    for (size_t i = 0; i < columns[0].size(); ++i) {
      const int64_t* place = &places[3 * i];
      tensors.push_back({address<void>(columns[0], i), address<const void>(columns[1], i),
                         address<float>(columns[2], i), address<void>(columns[3], i),
                         address<void>(columns[4], i), address<float>(columns[5], i),
                         address<float>(columns[6], i), counts[i], place[0], place[1], place[2], chunks});
      chunks += (counts[i] + kChunk - 1) / kChunk;
    }
    const auto* tables = reinterpret_cast<const float*>(*once[2]);  // values, then lines: signed, unsigned
    pypar::launch<pypar::adamw_kernels>(pypar::Adamw{tensors.data(),
                                                     static_cast<int64_t>(tensors.size()),
                                                     chunks,
                                                     reinterpret_cast<const float*>(once[0].value_or(0)),
                                                     reinterpret_cast<const float*>(once[1].value_or(0)),
                                                     {tables, tables + 256},
                                                     {tables + 512, tables + 526},
                                                     numbers[0],
                                                     numbers[1],
                                                     numbers[2],
                                                     numbers[3],
                                                     numbers[4],
                                                     numbers[5],
                                                     numbers[6],
                                                     numbers[7],
                                                     numbers[8],
                                                     key,
                                                     kinds[0],
                                                     kinds[1],
                                                     kinds[2],
                                                     kinds[3],
                                                     kinds[4],
                                                     kinds[5]});
  });
}

#endif
