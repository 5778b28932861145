// The kernel of both passes of attention's backward: backward.cu says which,
// backward_products.cuh what a block multiplies.
#pragma once

#include "attention/cuda/backward_products.cuh"

namespace pypar::cuda {

// Queries' values lie in memory padded to this many a sequence, so that a tile of them is whole and aligned.
constexpr int kPaddedQueries = 64;

struct BackwardArguments {
  AttentionBackward call;
  float* lse;    // [B, N, padded_length], in `score_unit`; of a query that saw nothing, above any score
  float* delta;  // the same shape: sum(dout * out) - dlse
  int64_t padded_length;  // with cumulative lengths: of all sequences together, and B is not a dimension
  int64_t values_batch_stride;  // N * padded_length; then 0
  int per_head;                 // blocks
  int group;                    // N / G
  bool modified;                // scores are more than scale * q . k, or dbias is wanted
  float inverse_softcap;        // 1 / softcap, if there is one
  float kept_factor;            // 1 / (1 - dropout_p)
};

// Where lse and delta of sequence b's first query begin, among those of a head.
__device__ __forceinline__ int first_value(const BackwardArguments& a, const Sequence& sequence, int b) {
  if (a.call.problem.cu_seqlens_q == nullptr) return 0;
  // At its place, moved up by a whole padding per sequence before it and rounded down: no two overlap.
  return (sequence.first_query / kPaddedQueries + b) * kPaddedQueries;
}

// Where those of head n begin; `first` is first_value's.
__device__ __forceinline__ int64_t values_index(const BackwardArguments& a, int b, int n, int first) {
  return b * a.values_batch_stride + n * a.padded_length + first;
}

// Scores and lse are multiplied by this: 16-bit types work in base 2, which saves a multiplication. In fp32
// the rounding of such large products would be the largest error of all: there the difference is multiplied
// instead.
template <class Tag>
constexpr float kScoreUnit = kLog2E;
template <>
constexpr float kScoreUnit<Float32Tag> = 1.0f;

// exp(x / kScoreUnit)
template <class Tag>
__device__ __forceinline__ float power(float x) {
  return std::is_same_v<Tag, Float32Tag> ? expf(x) : ptx::exp2_approx(x);
}

// product * factor - lse; in fp32 the product is rounded first, as in the forward kernel.
template <class Tag>
__device__ __forceinline__ float difference(float product, float factor, float lse) {
  return std::is_same_v<Tag, Float32Tag> ? __fmul_rn(product, factor) - lse : fmaf(product, factor, -lse);
}

// lse of a query that sees nothing: power(score - this) is 0.
constexpr float kNothingSeen = 3e38f;

// Address of a tensor's row.
template <class Element>
__device__ __forceinline__ Element* row_of(const AttentionTensor& t, int b, int64_t position, int head) {
  return static_cast<Element*>(t.data) + b * t.batch_stride + position * t.position_stride +
         head * t.head_stride;
}

// What a block works on. A copy lies in shared memory for what is rarely asked, to leave registers to the
// sums.
struct BackwardPlace {
  Sequence sequence;
  int b, head;  // of the rows
  int first_row;
  int num_rows, num_columns;    // of the sequence
  int first_column, num_tiles;  // of columns, of one head
  int num_steps;                // tiles of all heads
  int first_value;
  int low, high;  // column - row of what is seen
};

// False if there is no such block.
template <class Sizes, bool kKeys>
__device__ __forceinline__ bool find_place(const BackwardArguments& a, unsigned index, BackwardPlace& place) {
  const AttentionProblem& p = a.call.problem;
  // With a causal mask the last queries and the first keys have most to do: they begin.
  const BlockPlace block = locate(kKeys ? p.cu_seqlens_k : p.cu_seqlens_q, static_cast<int>(p.B),
                                  static_cast<int>(kKeys ? p.G : p.N), 1, Sizes::kRows, a.per_head, index,
                                  !kKeys && p.right != kUnbounded);
  if (!block.exists) return false;
  place.b = block.sequence, place.head = block.head;
  const Sequence& s = place.sequence = sequence_of(p, place.b);
  place.first_value = first_value(a, s, place.b);
  place.num_rows = kKeys ? s.S : s.T, place.num_columns = kKeys ? s.T : s.S;
  place.low = kKeys ? -s.high : s.low, place.high = kKeys ? -s.low : s.high;
  place.first_row = block.block * Sizes::kRows;
  const int last_row = smaller(place.first_row + Sizes::kRows, place.num_rows) - 1;
  const int begin = kKeys ? first_seeing(s, place.first_row) : first_seen(s, place.first_row);
  const int end = kKeys ? end_seeing(s, last_row) : end_seen(s, last_row);
  place.first_column = begin / Sizes::kColumns * Sizes::kColumns;
  place.num_tiles = begin < end ? (end - place.first_column + Sizes::kColumns - 1) / Sizes::kColumns : 0;
  place.num_steps = place.num_tiles * (kKeys ? a.group : 1);
  return true;
}

// A block's shared memory.
template <class Tag, int kSize>
struct BackwardMemory {
  using Sizes = BackwardSizes<Tag, kSize>;
  static constexpr int kRowBytes = BackwardProducts<Tag, kSize>::Rows::kRowBytes;
  static constexpr int kOwnBytes = Sizes::kRows * kRowBytes;
  static constexpr int kStreamedBytes = Sizes::kColumns * kRowBytes;
  static constexpr int kValuesBytes = Sizes::kColumns * 4;
  static constexpr int kPlaceStart = 2 * kOwnBytes + 4 * kStreamedBytes + 4 * kValuesBytes;
  static constexpr int kBytes = kPlaceStart + static_cast<int>(sizeof(BackwardPlace));

  unsigned char* start;
  __device__ __forceinline__ unsigned char* own(int which) const { return start + which * kOwnBytes; }
  __device__ __forceinline__ unsigned char* streamed(int stage, int which) const {
    return start + 2 * kOwnBytes + (2 * stage + which) * kStreamedBytes;
  }
  // lse (0) and delta (1) of the streamed columns, where these are queries.
  __device__ __forceinline__ float* values(int stage, int which) const {
    return reinterpret_cast<float*>(start + 2 * kOwnBytes + 4 * kStreamedBytes +
                                    (2 * stage + which) * kValuesBytes);
  }
  __device__ __forceinline__ BackwardPlace* place() const {
    return reinterpret_cast<BackwardPlace*>(start + kPlaceStart);
  }
};

// What turns products into P and dS.
template <class Tag, bool kKeys>
struct BackwardScores {
  const BackwardArguments& a;
  const BackwardPlace& place;
  int query_head;

  // Bit i: whether element i of a product is kept. Not unrolled whole: 32 times Philox is much code.
  template <int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ uint32_t kept(int row, int column) const {
    const AttentionProblem& p = a.call.problem;
    static_assert(kRowTiles * kColumnTiles * 4 <= 32, "one bit an element");
    const uint32_t stream = dropout_stream(p, place.b, made_anew(query_head));
    uint32_t bits = 0;
#pragma unroll 2
    for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
      const int r = row + i / (4 * kColumnTiles) * 16 + i / 2 % 2 * 8;
      const int c = column + i / 4 % kColumnTiles * 8 + i % 2;
      const uint32_t query = query_position(p, place.sequence, kKeys ? c : r);
      const uint32_t key = key_position(p, kKeys ? r : c);
      bits |= (dropped(query, key, stream, p.dropout_threshold) ? 0u : 1u) << i;
    }
    return bits;
  }

  // tanh(x / cap)
  static __device__ __forceinline__ float cap(float x, float cap, float inverse) {
    if constexpr (std::is_same_v<Tag, Float32Tag>) return tanhf(x / cap);
    return 1.0f - __fdividef(2.0f, ptx::exp2_approx(x * inverse * (2.0f * kLog2E)) + 1.0f);
  }

  // `s` holds q . k and `dp` dout . v, of rows from `row` and columns from `column` on (the thread's first).
  // They become P (0 where dropped, not yet divided by 1 - dropout_p) and the gradient of scale * q . k.
  // lse(m, n, e) and delta(m, n, e) are those of an element's query.
  template <int kRowTiles, int kColumnTiles, class Lse, class Delta>
  __device__ __forceinline__ void plain(Product<kRowTiles, kColumnTiles>& s,
                                        Product<kRowTiles, kColumnTiles>& dp, const Lse& lse,
                                        const Delta& delta) const {
    const float factor = a.call.problem.scale * kScoreUnit<Tag>;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[m][j][e] = power<Tag>(difference<Tag>(s[m][j][e], factor, lse(m, j, e)));
          dp[m][j][e] = s[m][j][e] * (dp[m][j][e] - delta(m, j, e));
        }
      }
    }
  }

  // The same with everything that changes a score or hides it.
  template <int kRowTiles, int kColumnTiles, class Lse, class Delta>
  __device__ __forceinline__ void modified(Product<kRowTiles, kColumnTiles>& s,
                                           Product<kRowTiles, kColumnTiles>& dp, int first_row,
                                           int first_column, const Lse& lse, const Delta& delta) const {
    const AttentionProblem& p = a.call.problem;
    const int n = made_anew(query_head);
    const bool dropout = p.dropout_p > 0.0f;
    const uint32_t bits = dropout ? kept<kRowTiles, kColumnTiles>(first_row, first_column) : ~0u;
    const float slope = alibi_slope(p, place.b, n) * kScoreUnit<Tag>;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const int row = made_anew(first_row), column = made_anew(first_column);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = row + 16 * m + e / 2 * 8, c = column + 8 * j + e % 2;
          const int query = kKeys ? c : r, key = kKeys ? r : c;
          const bool seen =
              r < place.num_rows && c < place.num_columns && c - r >= place.low && c - r <= place.high;
          float x = s[m][j][e] * p.scale, slope_of_cap = 1.0f;
          if (p.softcap > 0.0f) {
            const float capped = cap(x, p.softcap, a.inverse_softcap);
            x = p.softcap * capped;
            slope_of_cap = 1.0f - capped * capped;
          }
          x *= kScoreUnit<Tag>;
          if (p.alibi_slopes != nullptr) x -= slope * distance(place.sequence, p.step, query, key);
          if (p.bias.data != nullptr && seen) {
            x += bias_at(p.bias, bias_row(p.bias, place.b, n, query) + key * p.bias.key_stride) *
                 kScoreUnit<Tag>;
          }
          const float probability = seen ? power<Tag>(x - lse(m, j, e)) : 0.0f;
          const bool keep = (bits >> (m * kColumnTiles * 4 + j * 4 + e) & 1) != 0;
          const float ds = probability * ((keep ? dp[m][j][e] * a.kept_factor : 0.0f) - delta(m, j, e));
          if (!kKeys && a.call.dbias != nullptr && seen) {
            a.call.dbias[((place.b * p.N + n) * p.T + query) * p.S + key] = ds;
          }
          s[m][j][e] = keep ? probability : 0.0f;
          dp[m][j][e] = ds * slope_of_cap;
        }
      }
    }
  }
};

// Rows of factor * sum to a tensor, of which `row` is the thread's first; or added to it.
template <class Tag, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void store_sum(const Product<kRowTiles, kColumnTiles>& sum, float factor,
                                          const AttentionTensor& t, int64_t place, int row, int num_rows,
                                          int64_t size, bool accumulate) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int r = row + 8 * i;
    if (r >= num_rows) continue;
    const int64_t begin = place + r * t.position_stride + column;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      if (8 * n >= size) continue;
      float x = sum[i / 2][n][i % 2 * 2] * factor, y = sum[i / 2][n][i % 2 * 2 + 1] * factor;
      if (t.dtype == kFloat32) {
        float2* const to = reinterpret_cast<float2*>(static_cast<float*>(t.data) + begin + 8 * n);
        *to = accumulate ? make_float2(to->x + x, to->y + y) : make_float2(x, y);
      } else if constexpr (!std::is_same_v<Tag, Float32Tag>) {
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(t.data) + begin + 8 * n) = ptx::pack(x, y, Tag{});
      }
    }
  }
}

// Starts to copy kRows rows of `which` (0 or 1) of a head: its own rows (k, v or q, dout), or of what is
// streamed (the other two), from `first` of the sequence on.
template <class Tag, int kSize, bool kKeys, int kRows>
__device__ __forceinline__ void start_rows(const BackwardArguments& a, const BackwardPlace& place, int which,
                                           int head, int first, unsigned char* tile) {
  using Element = typename BackwardElement<Tag>::Type;
  const AttentionProblem& p = a.call.problem;
  const AttentionTensor& t = kKeys ? (which == 0 ? p.k : p.v) : (which == 0 ? p.q : a.call.dout);
  const int begin = kKeys ? place.sequence.first_key : place.sequence.first_query;
  const int num_rows = kKeys ? place.sequence.S : place.sequence.T;
  const int64_t bytes = sizeof(Element), size = which == 0 ? p.H : p.Hv;
  start_copy<typename BackwardProducts<Tag, kSize>::Rows, kRows, BackwardSizes<Tag, kSize>::kThreads>(
      tile, row_of<Element>(t, place.b, begin + first, head), t.position_stride * bytes, num_rows - first,
      static_cast<int>(size * bytes));
}

// The i-th tile of columns that a block works on: the tiles of one query head, then those of the next of the
// group.
template <bool kKeys>
struct BackwardTile {
  int head;    // of the group
  int column;  // its first
  __device__ __forceinline__ BackwardTile(const BackwardPlace& place, int columns, int i)
      : head(kKeys ? i / place.num_tiles : 0),
        column(place.first_column + (i - head * place.num_tiles) * columns) {}
};

// Starts to copy the i-th tile.
template <class Tag, int kSize, bool kKeys>
__device__ __forceinline__ void start_columns(const BackwardArguments& a, const BackwardPlace& place,
                                              const BackwardMemory<Tag, kSize>& memory, int i) {
  constexpr int kColumns = BackwardSizes<Tag, kSize>::kColumns;
  const BackwardTile<kKeys> tile(place, kColumns, i);
  const int stage = i % 2, head = kKeys ? place.head * a.group + tile.head : place.head / a.group;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    start_rows<Tag, kSize, !kKeys, kColumns>(a, place, which, head, tile.column,
                                             memory.streamed(stage, which));
  }
  const int piece = ptx::thread_index();
  if (kKeys && piece < kColumns / 2) {  // 16 bytes of lse, 16 bytes of delta
    const int64_t from = values_index(a, place.b, head, place.first_value) + tile.column;
    const int which = piece / (kColumns / 4), first = piece % (kColumns / 4) * 4;
    ptx::copy_async_16(memory.values(stage, which) + first, (which == 0 ? a.lse : a.delta) + from + first,
                       true);
  }
}

// The block's first row of which a thread has results.
template <int kRowTiles>
__device__ __forceinline__ int thread_row() {
  const int thread = ptx::thread_index();
  return thread / kWarp * 16 * kRowTiles + thread % kWarp / 4;
}

template <class Tag, int kSize, bool kKeys>
__global__ void __launch_bounds__(BackwardSizes<Tag, kSize>::kThreads, 1)
    attention_backward_kernel(const BackwardArguments a) {
  using Sizes = BackwardSizes<Tag, kSize>;
  constexpr int kRowTiles = Sizes::kRowTiles, kColumnTiles = Sizes::kStep / 8;
  constexpr bool kSplit = kKeys && Sizes::kSplit, kBoth = kKeys && !Sizes::kSplit;
  PYPAR_DYNAMIC_SHARED(shared);
  const BackwardMemory<Tag, kSize> memory{shared};
  const AttentionProblem& p = a.call.problem;

  // With a split, neighbours work on the same rows, so that they find them in L2.
  const bool values_only = kSplit && blockIdx.x % 2 != 0;  // dv, not dk
  {
    BackwardPlace found;
    if (!find_place<Sizes, kKeys>(a, kSplit ? blockIdx.x / 2 : blockIdx.x, found)) return;
    if (threadIdx.x == 0) *memory.place() = found;
  }
  __syncthreads();
  const BackwardPlace& place = *memory.place();
  if (place.num_tiles > 0) {
    start_rows<Tag, kSize, kKeys, Sizes::kRows>(a, place, 0, place.head, place.first_row, memory.own(0));
    if (!values_only) {
      start_rows<Tag, kSize, kKeys, Sizes::kRows>(a, place, 1, place.head, place.first_row, memory.own(1));
    }
    start_columns<Tag, kSize, kKeys>(a, place, memory, 0);
  }
  ptx::copy_async_commit();

  float row_lse[2 * kRowTiles], row_delta[2 * kRowTiles];  // queries' pass
  if (!kKeys) {
    const int64_t from = values_index(a, place.b, place.head, place.first_value);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = place.first_row + thread_row<kRowTiles>() + 8 * i;
      row_lse[i] = row < place.num_rows ? a.lse[from + row] : kNothingSeen;
      row_delta[i] = row < place.num_rows ? a.delta[from + row] : 0.0f;
    }
  }

  const BackwardProducts<Tag, kSize> products;
  Product<kRowTiles, kSize / 8> sum;                                 // dq or dk; with a split, dk or dv
  Product<kBoth ? kRowTiles : 1, kBoth ? kSize / 8 : 1> sum_values;  // dv
  set_zero(sum);
  set_zero(sum_values);
  for (int i = 0; i < place.num_steps; ++i) {
    ptx::copy_async_wait<0>();
    __syncthreads();  // this tile is there for all, and nobody reads the one before any more
    if (made_anew(i) + 1 < place.num_steps)
      start_columns<Tag, kSize, kKeys>(a, place, memory, made_anew(i) + 1);
    ptx::copy_async_commit();
#pragma unroll 1
    for (int step = 0; step < Sizes::kColumns; step += Sizes::kStep) {
      const BackwardTile<kKeys> tile(place, Sizes::kColumns, made_anew(i));
      const int stage = made_anew(i) % 2, warp_row = thread_row<kRowTiles>() / 16 * 16;
      const int column = tile.column + step, apart = column - place.first_row - warp_row;
      const int least = apart - (16 * kRowTiles - 1), most = apart + Sizes::kStep - 1;
      if (most < place.low || least > place.high) continue;  // the warp's rows see none of these columns
      const unsigned char* const tile0 = memory.streamed(stage, 0);
      const unsigned char* const tile1 = memory.streamed(stage, 1);
      Product<kRowTiles, kColumnTiles> s, dp;
      products.multiply(s, memory.own(0), warp_row, tile0, step, true);
      if (!values_only) {
        products.multiply(dp, memory.own(1), warp_row, tile1, step, false);
      } else {
        set_zero(dp);
      }
      const int thread_column = ptx::thread_index() % 4 * 2;
      const float* const column_lse = memory.values(stage, 0) + step + thread_column;
      const float* const column_delta = memory.values(stage, 1) + step + thread_column;
      const auto lse = [&](int m, int j, int e) {
        return kKeys ? column_lse[8 * j + e % 2] : row_lse[2 * m + e / 2];
      };
      const auto delta = [&](int m, int j, int e) {
        return kKeys ? column_delta[8 * j + e % 2] : row_delta[2 * m + e / 2];
      };
      const bool all_seen =
          least >= place.low && most <= place.high && column + Sizes::kStep <= place.num_columns;
      const BackwardScores<Tag, kKeys> scores{a, place,
                                              kKeys ? place.head * a.group + tile.head : place.head};
      if (all_seen && !a.modified) {
        scores.plain(s, dp, lse, delta);
      } else {
        scores.modified(s, dp, place.first_row + thread_row<kRowTiles>(), column + thread_column, lse, delta);
      }
      if constexpr (kBoth) products.add(sum_values, s, tile1, step);
      if constexpr (kSplit) {
        if (values_only) {
          products.add(sum, s, tile1, step);
          continue;
        }
      }
      products.add(sum, dp, tile0, step);
    }
  }

  const int first_own = kKeys ? place.sequence.first_key : place.sequence.first_query;
  const auto store = [&](const auto& from, const AttentionTensor& t, float factor, int64_t size) {
    const int64_t start =
        place.b * t.batch_stride + first_own * t.position_stride + place.head * t.head_stride;
    store_sum<Tag>(from, factor, t, start, place.first_row + thread_row<kRowTiles>(), place.num_rows, size,
                   a.call.accumulate);
  };
  if (!kKeys) {
    store(sum, a.call.dq, p.scale, p.H);
  } else if (!values_only) {
    store(sum, a.call.dk, p.scale, p.H);
  } else {
    store(sum, a.call.dv, a.kept_factor, p.Hv);
  }
  if constexpr (kBoth) store(sum_values, a.call.dv, a.kept_factor, p.Hv);
}

}  // namespace pypar::cuda
