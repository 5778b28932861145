// What attention's Python side hands to its kernels, CPU and GPU alike. Strides are in elements and may be
// anything.
#pragma once

#include "core/registry.h"

namespace pypar {

// A tensor [B, length, heads, size]: address and strides. With cumulative lengths its first two dimensions
// are one, all sequences one after the other, and batch_stride is 0.
struct AttentionTensor {
  void* data;
  int64_t batch_stride;
  int64_t position_stride;
  int64_t head_stride;
  int64_t element_stride;
  int dtype;  // ElementType
};

// bias [B, N, T, S], broadcast where a stride is 0.
struct AttentionBias {
  const void* data;  // null: none
  int64_t batch_stride;
  int64_t head_stride;
  int64_t query_stride;
  int64_t key_stride;
  int dtype;  // ElementType
};

// No bound of a window.
constexpr int64_t kUnbounded = -1;

struct AttentionProblem {
  // B sequences. T and S: their lengths; with cumulative lengths, all queries and all keys together.
  int64_t B, T, S, N, G, H, Hv;
  AttentionTensor q, k, v;
  const int32_t* cu_seqlens_q;  // [B + 1] or null
  const int32_t* cu_seqlens_k;  // the same
  float scale;
  float softcap;  // 0: none
  // A query sees the keys whose position is at most `left` before and at most `right` after its own;
  // kUnbounded: all of them. A causal mask is right = 0.
  int64_t left, right;
  // Query t is at position q_start + step * t, key s at k_start + step * s. If bottom_right, q_start is S - T
  // (of each sequence its own) and k_start is 0: the last query is at the last key's position.
  bool bottom_right;
  int64_t q_start, k_start, step;
  // Batch element b and head n are the (batch_start + b)th and the (head_start + n)th where dropout asks.
  int64_t batch_start, head_start;
  AttentionBias bias;
  const float* sinks;          // [N] or null
  const float* alibi_slopes;   // [B, N] or null
  int64_t alibi_batch_stride;  // N, or 0 for one row of slopes
  float dropout_p;             // 0: none
  uint32_t dropout_threshold;  // an element is dropped if its random number is below
  const int64_t* seed;         // one number, in the memory of q's device; null without dropout
  int num_threads;             // CPU
  void* stream;                // GPU
};

struct AttentionForward {
  AttentionProblem problem;
  AttentionTensor out;
  float* lse;         // contiguous: [B, N, T], with cumulative lengths [N, T]
  float* lse_rest;    // the same, or null: what rounding took off lse
  bool carry;         // out (then fp32) and lse hold attention over earlier keys, which this one continues
  void* memory;       // as many bytes as attention_forward_memory says, 64-byte aligned, of any content
  int32_t* left_out;  // CPU: see note_left_out
};

struct AttentionBackward {
  AttentionProblem problem;
  AttentionTensor dout, out, dq, dk, dv;
  const float* lse;       // as in AttentionForward
  const float* lse_rest;  // the same, or null: zero
  const float* dlse;      // the same, or null
  bool accumulate;        // dq, dk, dv (then fp32) are added to, not overwritten
  float* dbias;           // [B, N, T, S] contiguous, zero before the call, or null
  void* memory;           // as many bytes as attention_backward_memory says, 64-byte aligned, of any content
  int32_t* left_out;      // CPU: see note_left_out
};

// A probability of 0, of a key that a query does not see, times a value that is not finite would be NaN. So
// the products that sum over keys or over queries take such a value as 0, and a kernel notes that it did:
// attention/cpu/nonfinite.h then brings the value to those who see it. In fp32 that concerns the pairs of
// blocks of which some rows do not see some keys, and no others: only their operands are looked at.
static inline void note_left_out(int32_t* left_out) { __atomic_store_n(left_out, 1, __ATOMIC_RELAXED); }

}  // namespace pypar
