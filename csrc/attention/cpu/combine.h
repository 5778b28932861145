// From sums over keys to attention's output: the splits of the keys, the sink and what is carried are
// combined in a fixed order, normalised and rounded once.
#pragma once

#include "attention/cpu/block_products.h"

namespace pypar::PYPAR_ISA {

// What was summed over one range of keys or several: out (not normalised) = sum of e^(score - reference)
// value, sum = sum of e^(score - reference). Range i stands i * `bytes` behind the first.
struct Parts {
  char *references, *sums, *out;
  int64_t stride;  // of out's rows, in floats
  int64_t count, bytes;

  double reference(int64_t part, int64_t row) const {
    return reinterpret_cast<const double*>(references + part * bytes)[row];
  }
  double sum(int64_t part, int64_t row) const {
    return reinterpret_cast<const double*>(sums + part * bytes)[row];
  }
  const float* row(int64_t part, int64_t row) const {
    return reinterpret_cast<const float*>(out + part * bytes) + row * stride;
  }
  // The same of the head that is `head` further in the caller's memory.
  Parts of_head(int64_t head) const {
    const int64_t offset = head * count * bytes;
    return {references + offset, sums + offset, out + offset, stride, count, bytes};
  }
  // One part, its rows counted from `first`.
  Parts rows_from(int64_t first, int64_t part) const {
    return {references + part * bytes + first * 8,
            sums + part * bytes + first * 8,
            out + part * bytes + first * stride * 4,
            stride,
            1,
            0};
  }
};

// The splits of one key/value head in the caller's memory.
static inline Parts split_parts(const AttentionProblem& p, const ForwardShape& shape, char* memory) {
  return Parts{memory,           memory + shape.rows * 8, memory + shape.rows * 16, padded_size(p.Hv),
               shape.num_splits, split_bytes(p, shape)};
}

static inline int64_t lse_index(const AttentionProblem& p, const Sequence& s, int64_t key_head, int64_t row) {
  const int64_t group = p.N / p.G, head = key_head * group + row % group;
  // With cumulative lengths lse is [N, T] of all sequences together.
  const int64_t batch = p.cu_seqlens_q ? 0 : s.batch;
  return (batch * p.N + head) * p.T + s.q_begin + row / group;
}

constexpr double kNothing = -__builtin_inf();

// Adds what was summed over later keys to a row of `sums`. A row that saw none of them stays as it is. The
// weights are in two parts: an error of one is one that the whole row has.
static inline void combine_row(const Parts& sums, int64_t row, double reference, double sum, const float* out,
                               int64_t width) {
  double& old_reference = reinterpret_cast<double*>(sums.references)[row];
  double& old_sum = reinterpret_cast<double*>(sums.sums)[row];
  float* const to = reinterpret_cast<float*>(sums.out) + row * sums.stride;
  if (sum == 0.0) return;
  if (old_sum == 0.0) {
    old_reference = reference;
    old_sum = sum;
    std::memcpy(to, out, width * 4);
    return;
  }
  const bool grows = reference > old_reference;
  const double exact = __builtin_exp(grows ? old_reference - reference : reference - old_reference);
  const auto weight = static_cast<float>(exact), rest = static_cast<float>(exact - weight);
  old_sum = grows ? old_sum * exact + sum : old_sum + sum * exact;
  if (grows) old_reference = reference;
  for (int64_t j = 0; j < width; j += kWidth) {
    const Float x = load(grows ? to + j : out + j), y = load(grows ? out + j : to + j);
    store(to + j, y + (x * weight + x * rest));
  }
}

// Rows [first, first + count) of a key/value head; their parts are counted from `first`. `scratch`:
// padded_size(Hv) floats.
static inline void combine_parts(const AttentionForward& a, const Sequence& s, int64_t key_head,
                                 int64_t first, int64_t count, const Parts& parts, float* scratch) {
  const AttentionProblem& p = a.problem;
  const int64_t group = p.N / p.G, width = round_up(p.Hv, kWidth);
  const Rows out = rows_of(a.out, s.batch, s.q_begin, key_head, group);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t index = lse_index(p, s, key_head, first + row);
    const double sink = p.sinks ? p.sinks[key_head * group + (first + row) % group] : kNothing;
    const double carried = a.carry ? a.lse[index] : kNothing;
    double top = sink > carried ? sink : carried;
    bool nothing = top == kNothing;
    for (int64_t i = 0; i < parts.count; ++i) {
      if (parts.sum(i, row) == 0.0) continue;
      nothing = false;
      const double reference = parts.reference(i, row);
      if (reference > top) top = reference;
    }
    double total = 0.0;
    if (!nothing) {
      for (int64_t i = 0; i < parts.count; ++i) {
        const double sum = parts.sum(i, row);
        if (sum != 0.0) total += __builtin_exp(parts.reference(i, row) - top) * sum;
      }
      total += __builtin_exp(sink - top) + __builtin_exp(carried - top);
    }
    const double lse = nothing ? kNothing : top + __builtin_log(total);
    a.lse[index] = static_cast<float>(lse);
    if (a.lse_rest) a.lse_rest[index] = nothing ? 0.0f : static_cast<float>(lse - a.lse[index]);
    const auto weight = [&](int64_t i) {
      return parts.sum(i, row) == 0.0 ? 0.0 : __builtin_exp(parts.reference(i, row) - top) / total;
    };
    if (parts.count == 1 && !a.carry && out.dtype != kFloat32) {
      unpack(parts.row(0, row), width, 1, p.Hv, static_cast<float>(weight(0)), out, first + row);
      continue;
    }
    for (int64_t j = 0; j < width; j += kWidth) store(scratch + j, zero());
    for (int64_t i = 0; i < parts.count; ++i) {
      const float* from = parts.row(i, row);
      const double exact = weight(i);
      // In two parts: an error of a weight is one that the whole row has.
      const auto factor = static_cast<float>(exact), rest = static_cast<float>(exact - factor);
      if (factor == 0.0f) continue;
      for (int64_t j = 0; j < width; j += kWidth) {
        const Float x = load(from + j);
        store(scratch + j, load(scratch + j) + (x * factor + x * rest));
      }
    }
    if (a.carry) {
      const float factor = nothing ? 0.0f : static_cast<float>(__builtin_exp(carried - top) / total);
      const float* old = out.row<float>(first + row);
      for (int64_t j = 0; j < p.Hv && factor != 0.0f; ++j) scratch[j] += old[j * out.element_stride] * factor;
    }
    unpack(scratch, width, 1, p.Hv, 1.0f, out, first + row);
  }
}

}  // namespace pypar::PYPAR_ISA
