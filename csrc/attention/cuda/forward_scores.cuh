// From scores to probabilities in the forward kernel: what changes a score, which keys are hidden, the online
// softmax.
#pragma once

#include "attention/cuda/forward_work.cuh"

namespace pypar::cuda {

// A thread holds rows `row` + 16 i + 8 h and, of tile n, columns 8 n + 2 (lane % 4) and one more

// The block's row that is this thread's first, of a warp's.
template <class Shape>
__device__ __forceinline__ int thread_row(int warp_row) {
  return warp_row + static_cast<int>(threadIdx.x) % kWarp / 4;
}

// -inf for keys that a row does not see. The warp's keys begin at first_key.
template <class Shape>
__device__ __forceinline__ void hide(float (&scores)[Shape::kTilesM][Shape::kTilesN][4],
                                     const ForwardWork& work, int row, int first_key) {
  const int column = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int ih = 0; ih < Shape::kTilesM * 2; ++ih) {
    const int i = ih / 2, h = ih % 2;
    int t, n;
    find_row(work, row + i * 16 + h * 8, t, n);
    const int first = first_seen(work.sequence, t) - column, end = end_seen(work.sequence, t) - column;
#pragma unroll
    for (int j = 0; j < Shape::kTilesN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (j * 8 + e < first || j * 8 + e >= end) scores[i][j][h * 2 + e] = minus_infinity();
      }
    }
  }
}

// Adds bias to row h of a thread's two in a tile of scores; `bias` is the element of the thread's first
// column.
template <class Shape, class Element, class Convert>
__device__ __forceinline__ void add_bias(float (&scores)[Shape::kTilesN][4], int h, const Element* bias,
                                         int64_t stride, int num_left, const Convert& convert) {
#pragma unroll
  for (int j = 0; j < Shape::kTilesN; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (j * 8 + e < num_left) scores[j][h * 2 + e] += kLog2E * convert(bias[(j * 8 + e) * stride]);
    }
  }
}

// Raw scores to scores in base 2: scale, softcap, bias, ALiBi.
template <class Shape>
__device__ __forceinline__ void modify(float (&scores)[Shape::kTilesM][Shape::kTilesN][4],
                                       const AttentionProblem& p, const ForwardWork& work, int row,
                                       int first_key) {
  const int column = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
  const bool capped = p.softcap > 0.0f;
  const float before = capped ? p.scale / p.softcap : p.scale * kLog2E;
#pragma unroll
  for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kTilesN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[i][j][e] *= before;
    }
  }
  if (capped) {
    const float after = p.softcap * kLog2E;
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[i][j][e] = after * ptx::tanh_approx(scores[i][j][e]);
      }
    }
  }
  if (p.bias.data == nullptr && p.alibi_slopes == nullptr) return;
#pragma unroll
  for (int ih = 0; ih < Shape::kTilesM * 2; ++ih) {
    const int i = ih / 2, h = ih % 2;
    int t, n;
    find_row(work, row + i * 16 + h * 8, t, n);
    if (p.alibi_slopes != nullptr) {
      const float slope = alibi_slope(p, work.b, n) * -kLog2E;
#pragma unroll
      for (int j = 0; j < Shape::kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scores[i][j][h * 2 + e] += slope * distance(work.sequence, p.step, t, column + j * 8 + e);
        }
      }
    }
    if (p.bias.data == nullptr) continue;
    const int64_t begin = bias_row(p.bias, work.b, n, t) + column * p.bias.key_stride;
    const int num_left = work.sequence.S - column;
    if (p.bias.dtype == kFloat32) {
      add_bias<Shape>(scores[i], h, static_cast<const float*>(p.bias.data) + begin, p.bias.key_stride,
                      num_left, [](float x) { return x; });
    } else {
      add_bias<Shape>(scores[i], h, static_cast<const uint16_t*>(p.bias.data) + begin, p.bias.key_stride,
                      num_left, [](uint16_t x) { return ptx::unpack(x, typename Shape::Type{}); });
    }
  }
}

// Zeros for dropped probabilities.
template <class Shape>
__device__ __forceinline__ void drop(float (&scores)[Shape::kTilesM][Shape::kTilesN][4],
                                     const AttentionProblem& p, const ForwardWork& work,
                                     const uint32_t (&streams)[Shape::kTilesM * 2], int row, int first_key) {
  const int column = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
  const uint32_t step = static_cast<uint32_t>(p.step);
#pragma unroll
  for (int ih = 0; ih < Shape::kTilesM * 2; ++ih) {
    const int i = ih / 2, h = ih % 2;
    int t, n;
    find_row(work, row + i * 16 + h * 8, t, n);
    const uint32_t query = query_position(p, work.sequence, t), key = key_position(p, column);
#pragma unroll
    for (int j = 0; j < Shape::kTilesN; j += 2) {
      uint32_t keys[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) keys[e] = key + step * static_cast<uint32_t>((j + e / 2) * 8 + e % 2);
      const unsigned drops = dropped_of_four(query, keys, streams[ih], p.dropout_threshold);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (drops >> e & 1) scores[i][j + e / 2][h * 2 + e % 2] = 0.0f;
      }
    }
  }
}

// Scores -> 2^((score - reference) * factor), and the rows' new references and sums; `sums`, the output so
// far, follows the references.
template <class Shape>
__device__ __forceinline__ void online_softmax(float (&scores)[Shape::kTilesM][Shape::kTilesN][4],
                                               RunningSoftmax<Shape::kTilesM * 2>& state,
                                               float (&sums)[Shape::kTilesM][Shape::kHead / 8][4],
                                               float factor) {
  constexpr int kCount = Shape::kTilesM * 2;
  float top[kCount];
  bool grows = false;
#pragma unroll
  for (int ih = 0; ih < kCount; ++ih) {
    top[ih] = minus_infinity();
#pragma unroll
    for (int j = 0; j < Shape::kTilesN; ++j) {
      top[ih] = fmaxf(top[ih], fmaxf(scores[ih / 2][j][ih % 2 * 2], scores[ih / 2][j][ih % 2 * 2 + 1]));
    }
    top[ih] = quad_max(top[ih]);
    grows |= (top[ih] - state.reference[ih]) * factor > kSlack;  // -inf - -inf is NaN: false
  }
  if (__ballot_sync(kAllLanes, grows) != 0) {
#pragma unroll
    for (int ih = 0; ih < kCount; ++ih) {
      const float reference = fmaxf(state.reference[ih], top[ih]);
      const float shrink =
          reference == minus_infinity() ? 1.0f : ptx::exp2_approx((state.reference[ih] - reference) * factor);
      state.reference[ih] = reference;
      state.sum[ih] *= shrink;
#pragma unroll
      for (int n = 0; n < Shape::kHead / 8; ++n) {
        sums[ih / 2][n][ih % 2 * 2] *= shrink;
        sums[ih / 2][n][ih % 2 * 2 + 1] *= shrink;
      }
    }
  }
#pragma unroll
  for (int ih = 0; ih < kCount; ++ih) {
    const float reference = state.reference[ih] == minus_infinity() ? 0.0f : state.reference[ih] * factor;
#pragma unroll
    for (int j = 0; j < Shape::kTilesN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = scores[ih / 2][j][ih % 2 * 2 + e];
        x = ptx::exp2_approx(x * factor - reference);
        state.sum[ih] += x;
      }
    }
  }
}

}  // namespace pypar::cuda
