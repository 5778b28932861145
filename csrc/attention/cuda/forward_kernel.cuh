// The forward kernel: the loop over blocks of keys, and the results.
#pragma once

#include "attention/cuda/forward_scores.cuh"

namespace pypar::cuda {

// ---- results

struct RowEnd {
  float multiplier;  // makes the output of the sums
  float lse;         // natural
};

// From a row's reference and sum of 2^(score - reference), over all columns; the scores are in base 2, or
// natural. The sink belongs to the last of several parts.
template <bool kNatural>
__device__ __forceinline__ RowEnd finalize_row(const AttentionProblem& p, int n, float reference, float sum,
                                               bool last) {
  constexpr float kUnit = kNatural ? kLog2E : 1.0f;  // powers of two
  float shrink = 1.0f;
  if (last && p.sinks != nullptr) {
    const float sink = kNatural ? p.sinks[n] : p.sinks[n] * kLog2E;
    const float top = fmaxf(reference, sink);
    const float base = top == minus_infinity() ? 0.0f : top;
    shrink = ptx::exp2_approx((reference - base) * kUnit);
    sum = sum * shrink + ptx::exp2_approx((sink - base) * kUnit);
    reference = top;
  }
  RowEnd end;
  end.multiplier = sum == 0.0f ? 0.0f : shrink / (sum * (1.0f - p.dropout_p));
  end.lse = minus_infinity();
  if (sum != 0.0f) end.lse = (kNatural ? reference : reference * kLn2) + ptx::log2_approx(sum) * kLn2;
  return end;
}

// Eight columns of an output row.
template <class Type>
__device__ __forceinline__ void store_chunk(const AttentionForward& a, const ForwardSchedule& schedule,
                                            const ForwardWork& work, int row, int chunk,
                                            const float (&x)[8]) {
  int t, n;
  find_row(work, row, t, n);
  if (schedule.num_splits > 1) {
    const int64_t index = work.split * schedule.num_rows + row_index(a.problem, work.sequence, work.b, n, t);
    float* to = schedule.partial_out + index * a.problem.Hv + chunk * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = x[e];
  } else if (a.out.dtype == kFloat32) {
    float* to = query_row<float>(a.out, work, t, n) + chunk * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = x[e];
  } else {
    uint4 packed;
    packed.x = ptx::pack(x[0], x[1], Type{});
    packed.y = ptx::pack(x[2], x[3], Type{});
    packed.z = ptx::pack(x[4], x[5], Type{});
    packed.w = ptx::pack(x[6], x[7], Type{});
    *reinterpret_cast<uint4*>(query_row<uint16_t>(a.out, work, t, n) + chunk * 8) = packed;
  }
}

__device__ __forceinline__ void store_lse(const AttentionForward& a, const ForwardSchedule& schedule,
                                          const ForwardWork& work, int row, float lse) {
  int t, n;
  find_row(work, row, t, n);
  const int64_t index = row_index(a.problem, work.sequence, work.b, n, t);
  if (schedule.num_splits > 1) {
    schedule.partial_lse[work.split * schedule.num_rows + index] = lse;
  } else {
    a.lse[index] = lse;
  }
}

// A warp's own rows; its lanes' fragments become rows in `tile`, which only this warp touches.
template <class Shape>
__device__ __forceinline__ void store_rows(const AttentionForward& a, const ForwardSchedule& schedule,
                                           const ForwardWork& work, RunningSoftmax<Shape::kTilesM * 2>& state,
                                           float (&sums)[Shape::kTilesM][Shape::kHead / 8][4], float factor,
                                           unsigned char* tile) {
  using Rows = typename Shape::Rows;
  const int thread = ptx::thread_index(), lane = thread % kWarp;
  const int warp_row = __shfl_sync(kAllLanes, thread / kWarp, 0) * Shape::kTilesM * 16;
  const bool as_floats = schedule.num_splits > 1 || a.out.dtype == kFloat32;
#pragma unroll
  for (int ih = 0; ih < Shape::kTilesM * 2; ++ih) {
    const int i = ih / 2, h = ih % 2;
    const int row = warp_row + i * 16 + h * 8 + lane / 4;
    const bool exists = work.first_row + row < work.num_rows;
    int t, n;
    find_row(work, row, t, n);
    const RowEnd end = finalize_row<false>(a.problem, n, state.reference[ih] * factor,
                                           quad_sum(state.sum[ih]), schedule.num_splits == 1);
    if (lane % 4 == 0 && exists) store_lse(a, schedule, work, row, end.lse);
    if (!as_floats) {
#pragma unroll
      for (int j = 0; j < Shape::kHead / 8; ++j) {
        *reinterpret_cast<uint32_t*>(tile + Rows::offset(row, j) + lane % 4 * 4) =
            ptx::pack(sums[i][j][h * 2] * end.multiplier, sums[i][j][h * 2 + 1] * end.multiplier,
                      typename Shape::Type{});
      }
    } else if (exists) {
      const int64_t index =
          work.split * schedule.num_rows + row_index(a.problem, work.sequence, work.b, n, t);
      float* to = schedule.num_splits > 1 ? schedule.partial_out + index * a.problem.Hv
                                          : query_row<float>(a.out, work, t, n);
#pragma unroll
      for (int j = 0; j < Shape::kHead / 8; ++j) {
        const int column = j * 8 + lane % 4 * 2;
        if (column < a.problem.Hv) {
          *reinterpret_cast<float2*>(to + column) =
              make_float2(sums[i][j][h * 2] * end.multiplier, sums[i][j][h * 2 + 1] * end.multiplier);
        }
      }
    }
  }
  if (as_floats) return;
  __syncwarp();
  for (int index = lane; index < Shape::kTilesM * 16 * Rows::kChunks; index += kWarp) {
    const int row = warp_row + index / Rows::kChunks, chunk = index % Rows::kChunks;
    if (work.first_row + row < work.num_rows && chunk * 8 < a.problem.Hv) {
      int t, n;
      find_row(work, row, t, n);
      *reinterpret_cast<uint4*>(query_row<uint16_t>(a.out, work, t, n) + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + Rows::offset(row, chunk));
    }
  }
}

// kFewRows: the four warps' sums of the same rows, added in the order of the warps.
template <class Shape>
__device__ __forceinline__ void store_combined(const AttentionForward& a, const ForwardSchedule& schedule,
                                               const ForwardWork& work,
                                               RunningSoftmax<Shape::kTilesM * 2>& state,
                                               float (&sums)[Shape::kTilesM][Shape::kHead / 8][4],
                                               float factor, float* memory) {
  const int thread = ptx::thread_index(), lane = thread % kWarp, warp = thread / kWarp;
  float* const references = memory + Shape::kWarps * 16 * Shape::kCombinePitch;  // [warp][row]
  float* const row_sums = references + Shape::kWarps * 16;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + lane / 4 + h * 8;
    const float sum = quad_sum(state.sum[h]);
    if (lane % 4 == 0) {
      references[row] = state.reference[h] * factor;
      row_sums[row] = sum;
    }
#pragma unroll
    for (int j = 0; j < Shape::kHead / 8; ++j) {
      float* to = memory + row * Shape::kCombinePitch + j * 8 + lane % 4 * 2;
      to[0] = sums[0][j][h * 2];
      to[1] = sums[0][j][h * 2 + 1];
    }
  }
  __syncthreads();
  constexpr int kChunks = Shape::Rows::kChunks;
  for (int index = thread; index < 16 * kChunks; index += Shape::kThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    if (work.first_row + row >= work.num_rows || chunk * 8 >= a.problem.Hv) continue;
    float top = minus_infinity();
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) top = fmaxf(top, references[w * 16 + row]);
    float sum = 0.0f, x[8] = {};
    const float base = top == minus_infinity() ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      const float weight = ptx::exp2_approx(references[w * 16 + row] - base);
      sum += weight * row_sums[w * 16 + row];
      const float* from = memory + (w * 16 + row) * Shape::kCombinePitch + chunk * 8;
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] += weight * from[e];
    }
    int t, n;
    find_row(work, row, t, n);
    const RowEnd end = finalize_row<false>(a.problem, n, top, sum, schedule.num_splits == 1);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= end.multiplier;
    store_chunk<typename Shape::Type>(a, schedule, work, row, chunk, x);
    if (chunk == 0) store_lse(a, schedule, work, row, end.lse);
  }
}

// The running state before the first key: nothing, or what a carry holds.
template <class Shape>
__device__ __forceinline__ void begin(const AttentionForward& a, const ForwardWork& work, bool carry,
                                      int warp_row, RunningSoftmax<Shape::kTilesM * 2>& state,
                                      float (&sums)[Shape::kTilesM][Shape::kHead / 8][4], float factor) {
  const int lane = ptx::thread_index() % kWarp;
#pragma unroll
  for (int ih = 0; ih < Shape::kTilesM * 2; ++ih) {
    const int i = ih / 2, h = ih % 2;
    state.reference[ih] = minus_infinity();
    state.sum[ih] = 0.0f;
#pragma unroll
    for (int j = 0; j < Shape::kHead / 8; ++j) sums[i][j][h * 2] = sums[i][j][h * 2 + 1] = 0.0f;
    const int row = warp_row + i * 16 + h * 8 + lane / 4;
    if (!carry || work.first_row + row >= work.num_rows) continue;
    int t, n;
    find_row(work, row, t, n);
    const float lse = a.lse[row_index(a.problem, work.sequence, work.b, n, t)];
    if (lse == minus_infinity()) continue;
    state.reference[ih] = lse * kLog2E / factor;
    state.sum[ih] = lane % 4 == 0 ? 1.0f : 0.0f;  // the sum is over the four lanes
    const float* from = query_row<const float>(a.out, work, t, n);
    const float kept = 1.0f - a.problem.dropout_p;  // the end divides by it
#pragma unroll
    for (int j = 0; j < Shape::kHead / 8; ++j) {
      const int column = j * 8 + lane % 4 * 2;
      if (column >= a.problem.Hv) continue;
      const float2 pair = *reinterpret_cast<const float2*>(from + column);
      sums[i][j][h * 2] = kept * pair.x;
      sums[i][j][h * 2 + 1] = kept * pair.y;
    }
  }
}

// ---- the kernel

// Finds the thread block's work and its rows' positions; false if there is nothing to do.
template <class Shape>
__device__ __forceinline__ bool begin_work(const AttentionForward& a, const ForwardSchedule& schedule,
                                           ForwardWork& work, int& block, int& end_block) {
  ForwardWork here;
  if (!find_work<Shape>(a.problem, schedule, here)) return false;
  block = here.first_block, end_block = here.end_block;
  const bool nothing_new = block == end_block && a.problem.sinks == nullptr;
  if (a.carry && schedule.num_splits == 1 && nothing_new) return false;  // out and lse stay as they are
  for (int row = static_cast<int>(threadIdx.x); row < Shape::kRows; row += Shape::kThreads) {
    row_positions(work)[row] = smaller(here.first_row + row, here.num_rows - 1) / here.group;
  }
  if (threadIdx.x == 0) work = here;
  __syncthreads();
  return true;
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    attention_forward_kernel(const __grid_constant__ AttentionForward a,
                             const __grid_constant__ ForwardSchedule schedule) {
  constexpr int kRowsM = Shape::kTilesM * 16;
  PYPAR_DYNAMIC_SHARED(memory);
  unsigned char* const ring = memory + Shape::kQueryBytes;
  ForwardWork& work = *reinterpret_cast<ForwardWork*>(memory + Shape::kSharedBytes - Shape::kTableBytes);
  const AttentionProblem& p = a.problem;
  const bool carry = a.carry && schedule.num_splits == 1;
  int block, end_block;
  if (!begin_work<Shape>(a, schedule, work, block, end_block)) return;

  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int warp_row = Shape::kFewRows ? 0 : warp * kRowsM;
  const int warp_key = Shape::kFewRows ? warp * Shape::kWarpKeys : 0;
  const int row = thread_row<Shape>(warp_row);
  // Which keys any row of this warp sees, and which all of them see; rows that are none see nothing.
  int first_of_any, first_of_all, end_of_any, end_of_all;
  {
    int t_first, t_last, head;
    find_row(work, warp_row, t_first, head);
    find_row(work, warp_row + kRowsM - 1, t_last, head);
    first_of_any = first_seen(work.sequence, t_first), first_of_all = first_seen(work.sequence, t_last);
    end_of_any = work.first_row + warp_row < work.num_rows ? end_seen(work.sequence, t_last) : 0;
    end_of_all = end_seen(work.sequence, t_first);
  }

  // Tile 2 j is block j's keys, tile 2 j + 1 its values. A group is committed for each, also beyond the last,
  // so that waiting for all but kStages - 2 groups always means the tile at hand.
  KeyCopier<Shape> key_copier(p.k, p.H, work), value_copier(p.v, p.Hv, work);
  const auto copy_tile = [&](bool exists, bool is_values, int slot) {
    if (exists && is_values) value_copier.copy_block(p.v, ring + slot * Shape::kTileBytes);
    if (exists && !is_values) key_copier.copy_block(p.k, ring + slot * Shape::kTileBytes);
    ptx::copy_async_commit();
  };
  copy_queries<Shape>(p, work, memory);
#pragma unroll
  for (int i = 0; i < Shape::kStages - 1; ++i) copy_tile(block + i / 2 < end_block, i % 2 != 0, i);

  const float factor = Shape::kModified ? 1.0f : p.scale * kLog2E;
  RunningSoftmax<Shape::kTilesM * 2> state;
  float sums[Shape::kTilesM][Shape::kHead / 8][4];
  begin<Shape>(a, work, carry && (!Shape::kFewRows || warp == 0), warp_row, state, sums, factor);
  uint32_t streams[Shape::kTilesM * 2] = {};
  if (Shape::kModified && p.dropout_p > 0.0f) {
#pragma unroll
    for (int ih = 0; ih < Shape::kTilesM * 2; ++ih) {
      int t, n;
      find_row(work, row + ih / 2 * 16 + ih % 2 * 8, t, n);
      streams[ih] = dropout_stream(p, work.b, n);
    }
  }

  // Offsets of what this lane reads of the queries, and of keys and values in the ring's first slot.
  using Rows = typename Shape::Rows;
  const int lane_queries = Rows::lane_offset(false) + warp_row * Rows::kRowBytes;
  const int lane_keys = Rows::lane_offset(true) + Shape::kQueryBytes + warp_key * Rows::kRowBytes;
  const int lane_values = Rows::lane_offset(false) + Shape::kQueryBytes + warp_key * Rows::kRowBytes;

  uint32_t queries[Shape::kKeepQ ? Shape::kTilesM : 1][Shape::kKeepQ ? Shape::kHead / 16 : 1][4];
  if constexpr (Shape::kKeepQ) {
    ptx::copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
      for (int k = 0; k < Shape::kHead / 16; ++k) {
        ptx::load_matrix_x4(queries[i][k], memory + Rows::fragment_offset(lane_queries, i * 16, k * 16));
      }
    }
  }

  int slot = 0;  // of the tile at hand; the tile before it was in the slot before
  const auto next_tile = [&](bool exists, bool is_values) {  // fetches a tile that is kStages - 1 ahead
    ptx::copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
    copy_tile(exists, is_values, slot == 0 ? Shape::kStages - 1 : slot - 1);
    const int tile = slot * Shape::kTileBytes;
    slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
    return tile;
  };
  constexpr int kAhead = Shape::kStages - 1;
  for (; block < end_block; ++block) {
    const int first_key = block * Shape::kKeys + warp_key, end_key = first_key + Shape::kWarpKeys;
    const bool works = first_key < end_of_any && end_key > first_of_any;
    uint32_t probabilities[Shape::kTilesM][Shape::kTilesN / 2][4];
    const int keys = next_tile(block + kAhead / 2 < end_block, kAhead % 2 != 0);
    if (works) {
      float scores[Shape::kTilesM][Shape::kTilesN][4];
      multiply_keys<Shape>(scores, queries, memory, lane_queries, lane_keys + keys, static_cast<int>(p.H));
      if (Shape::kModified) modify<Shape>(scores, p, work, row, first_key);
      if (end_key > end_of_all || first_key < first_of_all) hide<Shape>(scores, work, row, first_key);
      online_softmax<Shape>(scores, state, sums, factor);
      if (Shape::kModified && p.dropout_p > 0.0f) drop<Shape>(scores, p, work, streams, row, first_key);
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
        for (int k = 0; k < Shape::kTilesN / 2; ++k) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float* pair = &scores[i][k * 2 + e / 2][e % 2 * 2];
            probabilities[i][k][e] = ptx::pack(pair[0], pair[1], typename Shape::Type{});
          }
        }
      }
    }
    const int values = next_tile(block + (kAhead + 1) / 2 < end_block, kAhead % 2 == 0);
    if (works)
      multiply_values<Shape>(sums, probabilities, memory, lane_values + values, static_cast<int>(p.Hv));
  }
  ptx::copy_async_wait<0>();
  __syncthreads();
  if constexpr (Shape::kFewRows) {
    store_combined<Shape>(a, schedule, work, state, sums, factor, reinterpret_cast<float*>(memory));
  } else {
    store_rows<Shape>(a, schedule, work, state, sums, factor, memory);
  }
}

}  // namespace pypar::cuda
