// What attention's Python side hands to its kernels. Strides are in elements and may be anything.
#pragma once

#include "registry.h"

namespace pypar {

// A tensor [B, length, heads, size]: address and strides.
struct AttentionTensor {
  void* data;
  int64_t batch_stride;
  int64_t position_stride;
  int64_t head_stride;
  int64_t element_stride;
  int dtype;  // ElementType
};

struct AttentionSizes {
  int64_t B, T, S, N, G, H, Hv;
  bool causal;
  float scale;
  int num_threads;
};

struct AttentionForward {
  AttentionSizes sizes;
  AttentionTensor q, k, v, out;
  float* lse;  // [B, N, T], contiguous
};

struct AttentionBackward {
  AttentionSizes sizes;
  AttentionTensor dout, q, k, v, out, dq, dk, dv;
  const float* lse;   // [B, N, T], contiguous
  const float* dlse;  // the same, or null
  float* row_values;  // memory of any content: per block of rows 3 * kAttentionBlock floats
  float* dq_sum;      // memory of any content: per block of rows kAttentionBlock * padded H floats
  int32_t* progress;  // per block of rows a zero: how many blocks of keys its dq_sum contains
};

// Query rows and keys are worked on in blocks of this many.
constexpr int64_t kAttentionBlock = 96;

// Rows of one key/value head: its N / G query heads at each position, heads adjacent.
static inline int64_t attention_row_blocks(const AttentionSizes& s) {
  return (s.T * (s.N / s.G) + kAttentionBlock - 1) / kAttentionBlock;
}

}  // namespace pypar
