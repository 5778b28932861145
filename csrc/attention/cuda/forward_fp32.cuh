// Attention forward in fp32 by multiply-add, and the kernel that combines the parts of split keys.
#pragma once

#include "attention/cuda/forward_kernel.cuh"

namespace pypar::cuda {

// 256 threads as 16 x 16. For scores a thread has 4 rows and every 16th key, for the output the same rows and
// 4 of every 64 columns. Keys and values take turns in one tile: with 64 rows of 256 columns no second one
// fits into 99 KiB.
template <int kHeadSize>
struct Float32Shape {
  static constexpr int kHead = kHeadSize;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 64;
  static constexpr int kKeys = kHead == 256 ? 16 : 32;
  static constexpr int kPitch = kHead + 4;  // floats; 8 lanes that read 16 bytes of 8 keys then use all banks
  static constexpr int kProbabilityPitch =
      kKeys + 4;  // the two rows that a warp writes to at once lie in different banks
  static constexpr int kQueryBytes = kRows * kPitch * 4;
  static constexpr int kTileBytes = kKeys * kPitch * 4;
  static constexpr int kTableBytes = kWorkBytes + kRows * 4;
  static constexpr int kSharedBytes = kQueryBytes + kTileBytes + kRows * kProbabilityPitch * 4 + kTableBytes;
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_120 have no more");
};

// Starts to copy rows [0, kCount) of kHead floats; columns from `size` on, and rows whose address is null,
// become 0.
template <class Shape, int kCount, class Source>
__device__ __forceinline__ void copy_floats(float* tile, int size, const Source& source) {
  constexpr int kChunks = Shape::kHead / 4;
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kChunks; i += Shape::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const float* from = source(row);
    ptx::copy_async_16(tile + row * Shape::kPitch + chunk * 4, from + chunk * 4,
                       from != nullptr && chunk * 4 < size);
  }
}

// scale * q . k of the thread's rows and keys, with softcap, bias and ALiBi, -inf where a key is not seen.
template <class Shape>
__device__ __forceinline__ void score_floats(float (&scores)[4][Shape::kKeys / 16], const AttentionProblem& p,
                                             const ForwardWork& work, const float* queries, const float* keys,
                                             int first_row, int first_key) {
  const int column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kKeys / 16; ++j) scores[i][j] = 0.0f;
  }
#pragma unroll 4
  for (int h = 0; h < static_cast<int>(p.H); h += 4) {
    float4 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      q[i] = *reinterpret_cast<const float4*>(queries + (first_row + i) * Shape::kPitch + h);
#pragma unroll
    for (int j = 0; j < Shape::kKeys / 16; ++j) {
      const float4 k = *reinterpret_cast<const float4*>(keys + (column + j * 16) * Shape::kPitch + h);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[i][j] += q[i].x * k.x;
        scores[i][j] += q[i].y * k.y;
        scores[i][j] += q[i].z * k.z;
        scores[i][j] += q[i].w * k.w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int t, n;
    find_row(work, first_row + i, t, n);
    const int first = first_seen(work.sequence, t), end = end_seen(work.sequence, t);
#pragma unroll
    for (int j = 0; j < Shape::kKeys / 16; ++j) {
      const int s = first_key + column + j * 16;
      float x = scores[i][j] * p.scale;
      if (p.softcap > 0.0f) x = p.softcap * tanhf(x / p.softcap);
      if (p.alibi_slopes != nullptr) x -= alibi_slope(p, work.b, n) * distance(work.sequence, p.step, t, s);
      if (s < first || s >= end) {
        x = minus_infinity();
      } else if (p.bias.data != nullptr) {
        x += bias_at(p.bias, bias_row(p.bias, work.b, n, t) + s * p.bias.key_stride);
      }
      scores[i][j] = x;
    }
  }
}

// A maximum, a sum over the 16 threads that share rows.
__device__ __forceinline__ float max_of_sixteen(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
__device__ __forceinline__ float sum_of_sixteen(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Scores to probabilities in `probabilities` [row][key], less those that are dropped; references, sums and
// the output so far follow.
template <class Shape>
__device__ __forceinline__ void online_softmax_fp32(float (&scores)[4][Shape::kKeys / 16],
                                                    const AttentionProblem& p, const ForwardWork& work,
                                                    RunningSoftmax<4>& state,
                                                    float (&sums)[4][Shape::kHead / 16], float* probabilities,
                                                    int first_row, int first_key) {
  const int column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float top = scores[i][0];
#pragma unroll
    for (int j = 1; j < Shape::kKeys / 16; ++j) top = fmaxf(top, scores[i][j]);
    top = fmaxf(state.reference[i], max_of_sixteen(top));
    const float base = top == minus_infinity() ? 0.0f : top;
    const float shrink = ptx::exp2_approx((state.reference[i] - base) * kLog2E);
    state.reference[i] = top;
    state.sum[i] *= shrink;
#pragma unroll
    for (int c = 0; c < Shape::kHead / 16; ++c) sums[i][c] *= shrink;
    int t, n;
    find_row(work, first_row + i, t, n);
    const uint32_t stream = p.dropout_p > 0.0f ? dropout_stream(p, work.b, n) : 0;
#pragma unroll
    for (int j = 0; j < Shape::kKeys / 16; ++j) {
      const int s = first_key + column + j * 16;
      float x = ptx::exp2_approx((scores[i][j] - base) * kLog2E);
      state.sum[i] += x;
      if (p.dropout_p > 0.0f &&
          dropped(query_position(p, work.sequence, t), key_position(p, s), stream, p.dropout_threshold)) {
        x = 0.0f;
      }
      probabilities[(first_row + i) * Shape::kProbabilityPitch + column + j * 16] = x;
    }
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    attention_forward_fp32_kernel(const __grid_constant__ AttentionForward a,
                                  const __grid_constant__ ForwardSchedule schedule) {
  PYPAR_DYNAMIC_SHARED(memory);
  float* const queries = reinterpret_cast<float*>(memory);
  float* const tile = reinterpret_cast<float*>(memory + Shape::kQueryBytes);
  float* const probabilities = reinterpret_cast<float*>(memory + Shape::kQueryBytes + Shape::kTileBytes);
  ForwardWork& work = *reinterpret_cast<ForwardWork*>(memory + Shape::kSharedBytes - Shape::kTableBytes);
  const AttentionProblem& p = a.problem;
  const bool carry = a.carry && schedule.num_splits == 1;
  int block, end_block;
  if (!begin_work<Shape>(a, schedule, work, block, end_block)) return;

  const int column = static_cast<int>(threadIdx.x) % 16, first_row = static_cast<int>(threadIdx.x) / 16 * 4;
  copy_floats<Shape, Shape::kRows>(queries, static_cast<int>(p.H), [&](int row) -> const float* {
    int t, n;
    find_row(work, row, t, n);
    return work.first_row + row < work.num_rows ? query_row<const float>(p.q, work, t, n) : nullptr;
  });
  const auto copy_block = [&](const AttentionTensor& x, int64_t size) {
    const float* begin =
        static_cast<const float*>(x.data) + work.b * x.batch_stride + work.g * x.head_stride +
        (work.sequence.first_key + static_cast<int64_t>(block) * Shape::kKeys) * x.position_stride;
    const int num_left = work.sequence.S - block * Shape::kKeys;
    copy_floats<Shape, Shape::kKeys>(tile, static_cast<int>(size), [&](int row) -> const float* {
      return row < num_left ? begin + row * x.position_stride : nullptr;
    });
    ptx::copy_async_commit();
  };

  RunningSoftmax<4> state;
  float sums[4][Shape::kHead / 16];  // column 64 (c / 4) + 4 (thread's column) + c % 4
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    state.reference[i] = minus_infinity();
    state.sum[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < Shape::kHead / 16; ++c) sums[i][c] = 0.0f;
    if (!carry || work.first_row + first_row + i >= work.num_rows) continue;
    int t, n;
    find_row(work, first_row + i, t, n);
    const float lse = a.lse[row_index(p, work.sequence, work.b, n, t)];
    if (lse == minus_infinity()) continue;
    state.reference[i] = lse;
    state.sum[i] = column == 0 ? 1.0f : 0.0f;
    const float* from = query_row<const float>(a.out, work, t, n);
#pragma unroll
    for (int c = 0; c < Shape::kHead / 16; ++c) {
      const int at = c / 4 * 64 + column * 4 + c % 4;
      if (at < p.Hv) sums[i][c] = (1.0f - p.dropout_p) * from[at];
    }
  }

  for (; block < end_block; ++block) {
    copy_block(p.k, p.H);
    ptx::copy_async_wait<0>();
    __syncthreads();
    float scores[4][Shape::kKeys / 16];
    score_floats<Shape>(scores, p, work, queries, tile, first_row, block * Shape::kKeys);
    __syncthreads();
    copy_block(p.v, p.Hv);
    online_softmax_fp32<Shape>(scores, p, work, state, sums, probabilities, first_row, block * Shape::kKeys);
    ptx::copy_async_wait<0>();
    __syncthreads();
#pragma unroll 4
    for (int s = 0; s < Shape::kKeys; ++s) {
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[i] = probabilities[(first_row + i) * Shape::kProbabilityPitch + s];
#pragma unroll
      for (int c = 0; c < Shape::kHead / 16; c += 4) {
        const float4 v = *reinterpret_cast<const float4*>(tile + s * Shape::kPitch + c * 16 + column * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[i][c] += weight[i] * v.x;
          sums[i][c + 1] += weight[i] * v.y;
          sums[i][c + 2] += weight[i] * v.z;
          sums[i][c + 3] += weight[i] * v.w;
        }
      }
    }
    __syncthreads();
  }
  ptx::copy_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + i;
    int t, n;
    find_row(work, row, t, n);
    const RowEnd end =
        finalize_row<true>(p, n, state.reference[i], sum_of_sixteen(state.sum[i]), schedule.num_splits == 1);
    if (work.first_row + row >= work.num_rows) continue;
    if (column == 0) store_lse(a, schedule, work, row, end.lse);
    const int64_t index = work.split * schedule.num_rows + row_index(p, work.sequence, work.b, n, t);
    float* to =
        schedule.num_splits > 1 ? schedule.partial_out + index * p.Hv : query_row<float>(a.out, work, t, n);
#pragma unroll
    for (int c = 0; c < Shape::kHead / 16; ++c) {
      const int at = c / 4 * 64 + column * 4 + c % 4;
      if (at < p.Hv) to[at] = sums[i][c] * end.multiplier;
    }
  }
}

// Combines the parts of split keys in their order, with the carry and the sink: a warp a row.
constexpr int kCombineThreads = 128;

static __global__ void __launch_bounds__(kCombineThreads)
    attention_combine_kernel(const __grid_constant__ AttentionForward a,
                             const __grid_constant__ ForwardSchedule schedule) {
  const AttentionProblem& p = a.problem;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row =
      (blockIdx.x * static_cast<int64_t>(kCombineThreads) + threadIdx.x) / kWarp;  // row_index's
  if (row >= schedule.num_rows) return;
  const int64_t head = row / p.T, t = row - head * p.T, b = head / p.N, n = head - b * p.N;
  const int64_t at = b * a.out.batch_stride + t * a.out.position_stride + n * a.out.head_stride;
  const float carried = a.carry ? a.lse[row] : minus_infinity();
  const float sink = p.sinks != nullptr ? p.sinks[n] : minus_infinity();
  float top = fmaxf(carried, sink);
  for (int i = 0; i < schedule.num_splits; ++i)
    top = fmaxf(top, schedule.partial_lse[i * schedule.num_rows + row]);
  const float base = top == minus_infinity() ? 0.0f : top;
  const auto weight = [&](float lse) { return ptx::exp2_approx((lse - base) * kLog2E); };
  float sum = weight(carried) + weight(sink);
  for (int i = 0; i < schedule.num_splits; ++i)
    sum += weight(schedule.partial_lse[i * schedule.num_rows + row]);
  const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int column = lane; column < p.Hv; column += kWarp) {
    float x = 0.0f;
    if (a.carry && carried != minus_infinity())
      x = weight(carried) * static_cast<const float*>(a.out.data)[at + column];
    for (int i = 0; i < schedule.num_splits; ++i) {
      const int64_t part = i * schedule.num_rows + row;
      x += weight(schedule.partial_lse[part]) * schedule.partial_out[part * p.Hv + column];
    }
    x *= share;
    if (a.out.dtype == kFloat32) {
      static_cast<float*>(a.out.data)[at + column] = x;
    } else {
      const uint32_t packed = a.out.dtype == kBFloat16 ? ptx::pack_bf16(x, 0.0f) : ptx::pack_f16(x, 0.0f);
      static_cast<uint16_t*>(a.out.data)[at + column] = static_cast<uint16_t>(packed);
    }
  }
  __syncwarp();  // all lanes have read the carried lse
  if (lane == 0) a.lse[row] = sum == 0.0f ? minus_infinity() : top + ptx::log2_approx(sum) * kLn2;
}

}  // namespace pypar::cuda
