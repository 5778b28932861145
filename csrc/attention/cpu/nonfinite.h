// Values that are not finite, brought to those who see them and to nobody else.
//
// The kernels' products over keys or queries include pairs that do not see each other, with a weight of 0,
// and 0 * NaN is NaN. They take a value that is not finite as 0 there and note it. Then what it does to those
// who see it is added here: to the outputs and dv itself, to dq and dk NaN, as it reaches them only by way of
// a score of NaN, by one of infinity, whose gradient has no value, or by one of -infinity, whose gradient of
// 0 has none times infinity.
// So a key that a query does not see changes no bit of the query's results, nor the other way round. Compiled
// once, for all instruction sets: this rarely runs.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/cpu/tile_scheduler.h"

namespace pypar {

enum class NonFinite : uint8_t { kNone, kPositive, kNegative, kNaN };

static inline NonFinite join(NonFinite a, NonFinite b) {
  if (a == NonFinite::kNone || a == b) return b;
  return b == NonFinite::kNone ? a : NonFinite::kNaN;
}

// The bits of a type's infinity, without sign; NaN has more.
static inline uint32_t infinity_bits(int dtype) {
  return dtype == kFloat32 ? 0x7f800000u : dtype == kBFloat16 ? 0x7f80u : 0x7c00u;
}

static inline NonFinite read_nonfinite(const void* at, int dtype) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, at, dtype == kFloat32 ? 4 : 2);
  const uint32_t sign = dtype == kFloat32 ? 0x80000000u : 0x8000u, infinity = infinity_bits(dtype);
  if ((bits & ~sign) < infinity) return NonFinite::kNone;
  if ((bits & ~sign) > infinity) return NonFinite::kNaN;
  return bits & sign ? NonFinite::kNegative : NonFinite::kPositive;
}

static inline void write_nonfinite(void* at, int dtype, NonFinite x) {
  const uint32_t sign = dtype == kFloat32 ? 0x80000000u : 0x8000u, infinity = infinity_bits(dtype);
  const uint32_t quiet = dtype == kFloat32 ? 0x400000u : dtype == kBFloat16 ? 0x40u : 0x200u;
  const uint32_t bits = infinity | (x == NonFinite::kNaN ? quiet : x == NonFinite::kNegative ? sign : 0u);
  __builtin_memcpy(at, &bits, dtype == kFloat32 ? 4 : 2);
}

// The vectors of one sequence and key/value head in a tensor: of its keys, or of the rows of the queries that
// share it, `group` heads adjacent at each position.
struct Vectors {
  AttentionTensor x;
  int64_t count, size, group;
  bool of_keys;

  char* at(int64_t index, int64_t element) const {
    const int64_t offset = index / group * x.position_stride + index % group * x.head_stride;
    return static_cast<char*>(x.data) + (offset + element * x.element_stride) * width();
  }
  int64_t width() const { return x.dtype == kFloat32 ? 4 : 2; }
};

static inline Vectors vectors_of(const AttentionProblem& p, const Sequence& s, int64_t head,
                                 const AttentionTensor& x, int64_t size, bool of_keys) {
  const int64_t group = of_keys ? 1 : p.N / p.G, length = of_keys ? s.S : s.T;
  Vectors v{x, length * group, size, group, of_keys};
  const int64_t batch = p.cu_seqlens_q ? 0 : s.batch;
  const int64_t offset = batch * x.batch_stride + (of_keys ? s.k_begin : s.q_begin) * x.position_stride +
                         head * group * x.head_stride;
  v.x.data = static_cast<char*>(x.data) + offset * v.width();
  return v;
}

static inline bool bias_hides(const AttentionProblem& p, const Sequence& s, int64_t head, int64_t row,
                              int64_t key) {
  const AttentionBias& b = p.bias;
  if (!b.data) return false;
  const int64_t group = p.N / p.G;
  const int64_t offset = s.batch * b.batch_stride + (head * group + row % group) * b.head_stride +
                         row / group * b.query_stride + key * b.key_stride;
  const char* at = static_cast<const char*>(b.data) + offset * (b.dtype == kFloat32 ? 4 : 2);
  return read_nonfinite(at, b.dtype) == NonFinite::kNegative;
}

// What is not finite in the vectors of one operand: of vector i of `indices` the elements [ends[i - 1],
// ends[i]).
struct Leftovers {
  struct Element {
    int64_t column;
    NonFinite value;
  };
  std::vector<int64_t> indices, ends;
  std::vector<Element> elements;
  int64_t num_columns = 0;  // that have any

  Leftovers(const Vectors& from, bool as_nan) {
    std::vector<bool> columns(from.size);
    for (int64_t i = 0; i < from.count; ++i) {
      const auto before = elements.size();
      for (int64_t j = 0; j < from.size; ++j) {
        const NonFinite x = read_nonfinite(from.at(i, j), from.x.dtype);
        if (x == NonFinite::kNone) continue;
        elements.push_back({j, as_nan ? NonFinite::kNaN : x});
        num_columns += columns[j] ? 0 : 1;
        columns[j] = true;
      }
      if (elements.size() == before) continue;
      indices.push_back(i);
      ends.push_back(static_cast<int64_t>(elements.size()));
    }
  }
};

// What is not finite in one operand into the result that is a sum over its vectors, of one key/value head.
static inline void add_head(const AttentionProblem& p, const Sequence& s, int64_t head, const Vectors& from,
                            const Vectors& to, bool as_nan) {
  const Leftovers left(from, as_nan);
  const auto count = static_cast<int64_t>(left.indices.size());
  std::vector<NonFinite> sums(to.size);
  for (int64_t target = 0; target < to.count && count > 0; ++target) {
    const int64_t position = target / to.group;
    const Range seen = to.of_keys ? queries_seeing(s, position, position) : keys_seen(s, position, position);
    const int64_t begin = seen.begin * from.group, end = seen.end * from.group;
    if (begin == end) continue;
    int64_t num_nan = 0,
            i = std::lower_bound(left.indices.begin(), left.indices.end(), begin) - left.indices.begin();
    sums.assign(to.size, NonFinite::kNone);
    // Once every column that can become NaN is, nothing changes any more.
    for (; i < count && left.indices[i] < end && num_nan < left.num_columns; ++i) {
      const int64_t source = left.indices[i];
      const int64_t row = to.of_keys ? source : target, key = to.of_keys ? target : source;
      if (bias_hides(p, s, head, row, key)) continue;
      for (int64_t j = i == 0 ? 0 : left.ends[i - 1]; j < left.ends[i]; ++j) {
        NonFinite& sum = sums[left.elements[j].column];
        const NonFinite now = join(sum, left.elements[j].value);
        num_nan += now == NonFinite::kNaN && sum != now ? 1 : 0;
        sum = now;
      }
    }
    for (int64_t j = 0; j < to.size; ++j) {
      char* const at = to.at(target, j);
      if (sums[j] != NonFinite::kNone)
        write_nonfinite(at, to.x.dtype, join(read_nonfinite(at, to.x.dtype), sums[j]));
    }
  }
}

// `from` and `to`: tensors of vectors of `size`, of keys the one and of queries the other.
static inline void add_unseen(const AttentionProblem& p, const AttentionTensor& from,
                              const AttentionTensor& to, int64_t size, bool to_keys, bool as_nan) {
  for (int64_t i = 0; i < p.B; ++i) {
    const Sequence s = sequence_of(p, i);
    for (int64_t head = 0; head < p.G; ++head) {
      add_head(p, s, head, vectors_of(p, s, head, from, size, !to_keys),
               vectors_of(p, s, head, to, size, to_keys), as_nan);
    }
  }
}

static inline void add_left_out(const AttentionForward& a) {
  add_unseen(a.problem, a.problem.v, a.out, a.problem.Hv, false, false);
}

static inline void add_left_out(const AttentionBackward& a) {
  const AttentionProblem& p = a.problem;
  add_unseen(p, p.k, a.dq, p.H, false, true);
  add_unseen(p, p.q, a.dk, p.H, true, true);
  add_unseen(p, a.dout, a.dv, p.Hv, true, false);
}

// As `launch`.
template <class Kernels, class Arguments>
void launch_with_unseen(const Arguments& arguments) {
  int32_t left_out = 0;
  Arguments noted = arguments;
  noted.left_out = &left_out;
  launch<Kernels>(noted);
  if (left_out == 0) return;
  pybind11::gil_scoped_release unlocked;
  add_left_out(noted);
}

}  // namespace pypar
