// What attention's forward and backward kernels share: which sequence, head and rows a thread block works on,
// which keys its rows see, what is done to a score besides multiplying, and tiles in shared memory.
//
// The N / G query heads of a key/value head are packed into rows: row r of key/value head g is position r /
// group of query head g * group + r % group. Short T then fills tiles, and a key is read once for all of
// them.
#pragma once

#include "attention/arguments.h"
#include "core/cuda_launch.h"
#include "core/ptx.h"

namespace pypar::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
// From a query to the end of a window that has none; lengths, T * N / G and S, must be below it.
constexpr int kFar = (1 << 30) - 1;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- where a thread block works

struct BlockPlace {
  int sequence;  // b
  int head;      // g
  int block;     // of the sequence's rows
  bool exists;   // with cumulative lengths the grid is a little too large
};

// How many blocks of `block_rows` rows `locate` deals with; `length` positions of `rows_per_position` rows
// each.
inline int64_t blocks_per_head(bool varlen, int64_t B, int64_t length, int64_t rows_per_position,
                               int64_t block_rows) {
  const int64_t blocks = (length * rows_per_position + block_rows - 1) / block_rows;
  return varlen ? blocks + B : blocks;  // every sequence rounds up
}

inline int64_t num_blocks(bool varlen, int64_t B, int64_t G, int64_t length, int64_t rows_per_position,
                          int64_t block_rows) {
  return blocks_per_head(varlen, B, length, rows_per_position, block_rows) * G * (varlen ? 1 : B);
}

// The place of block `index` < num_blocks(...); `per_head` is blocks_per_head(...). A head's blocks are
// neighbours, so that its keys stay in L2; `last_first` starts with the last, the longest under a causal
// mask. With cumulative lengths every warp walks over all sequences, 32 at a time.
__device__ __forceinline__ BlockPlace locate(const int32_t* cu_seqlens, int B, int G, int rows_per_position,
                                             int block_rows, int per_head, unsigned index, bool last_first) {
  const unsigned outer = index / static_cast<unsigned>(per_head);
  int block = static_cast<int>(index - outer * static_cast<unsigned>(per_head));
  if (last_first) block = per_head - 1 - block;
  if (cu_seqlens == nullptr) {
    const unsigned b = outer / static_cast<unsigned>(G);
    return BlockPlace{static_cast<int>(b), static_cast<int>(outer - b * static_cast<unsigned>(G)), block,
                      true};
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int first = 0; first < B; first += kWarp) {
    const int b = first + lane;
    int count = 0;
    if (b < B) {
      const int rows = (cu_seqlens[b + 1] - cu_seqlens[b]) * rows_per_position;
      count = (rows + block_rows - 1) / block_rows;
    }
    int end = count;  // blocks of this lane's sequence and of those before it
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += before;
    }
    const unsigned beyond = __ballot_sync(kAllLanes, end > block);
    if (beyond != 0) {
      const int found = __ffs(static_cast<int>(beyond)) - 1;
      const int start = __shfl_sync(kAllLanes, end - count, found);
      return BlockPlace{first + found, static_cast<int>(outer), block - start, true};
    }
    block -= __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return BlockPlace{0, 0, 0, false};
}

// ---- a sequence, and what its queries see

struct Sequence {
  int first_query, first_key;  // in tensors with cumulative lengths, else 0
  int T, S;
  int offset;     // position of query t less that of key s: offset + step * (t - s)
  int low, high;  // query t sees keys t + low ... t + high
};

__device__ __forceinline__ int64_t floor_divide(int64_t a, int64_t b) {  // b > 0
  if (b == 1) return a;
  const int64_t quotient = a / b;
  return quotient - (quotient * b > a ? 1 : 0);
}

__device__ __forceinline__ Sequence sequence_of(const AttentionProblem& p, int b) {
  Sequence s;
  s.first_query = p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[b] : 0;
  s.first_key = p.cu_seqlens_k != nullptr ? p.cu_seqlens_k[b] : 0;
  s.T = p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[b + 1] - s.first_query : static_cast<int>(p.T);
  s.S = p.cu_seqlens_k != nullptr ? p.cu_seqlens_k[b + 1] - s.first_key : static_cast<int>(p.S);
  const int64_t offset = p.bottom_right ? static_cast<int64_t>(s.S) - s.T : p.q_start - p.k_start;
  constexpr int64_t kMost = kFar;
  s.offset = static_cast<int>(offset);
  s.low = -kFar;
  s.high = kFar;
  if (p.left != kUnbounded) {  // ceil((offset - left) / step)
    s.low = static_cast<int>(larger(-kMost, smaller(kMost, -floor_divide(p.left - offset, p.step))));
  }
  if (p.right != kUnbounded) {
    s.high = static_cast<int>(larger(-kMost, smaller(kMost, floor_divide(offset + p.right, p.step))));
  }
  return s;
}

// The first key that query t sees, and the one after the last. Lengths are below kFar: nothing overflows.
__device__ __forceinline__ int first_seen(const Sequence& s, int t) {
  return larger(0, smaller(s.S, t + s.low));
}
__device__ __forceinline__ int end_seen(const Sequence& s, int t) {
  return larger(0, smaller(s.S, t + s.high + 1));
}
// The first query that sees key s, and the one after the last.
__device__ __forceinline__ int first_seeing(const Sequence& q, int s) {
  return larger(0, smaller(q.T, s - q.high));
}
__device__ __forceinline__ int end_seeing(const Sequence& q, int s) {
  return larger(0, smaller(q.T, s - q.low + 1));
}

// Where lse, dlse and dense row results have query t (within its sequence) of head n.
__device__ __forceinline__ int64_t row_index(const AttentionProblem& p, const Sequence& s, int b, int n,
                                             int t) {
  const int64_t head = p.cu_seqlens_q != nullptr ? n : b * p.N + n;
  return head * p.T + s.first_query + t;
}

// ---- scores

// Whether scores are anything but scale * q . k (the mask apart).
inline bool modifies_scores(const AttentionProblem& p) {
  return p.softcap > 0.0f || p.bias.data != nullptr || p.alibi_slopes != nullptr || p.dropout_p > 0.0f;
}

// Philox 2x32-10 (Salmon et al., SC 2011): two random numbers for (c0, c1) under a key.
__device__ __forceinline__ void philox(uint32_t& c0, uint32_t& c1, uint32_t key) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high = __umulhi(0xD256D193u, c0);
    const uint32_t low = 0xD256D193u * c0;
    c0 = high ^ key ^ c1;
    c1 = low;
    key += 0x9E3779B9u;
  }
}

// The key of batch element b's and head n's random numbers.
__device__ __forceinline__ uint32_t dropout_stream(const AttentionProblem& p, int b, int n) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  uint32_t c0 = static_cast<uint32_t>(p.batch_start + b), c1 = static_cast<uint32_t>(p.head_start + n);
  philox(c0, c1, static_cast<uint32_t>(seed));
  philox(c0, c1, static_cast<uint32_t>(seed >> 32));
  return c0;
}

// The position of query t, of key s, as dropout counts them.
__device__ __forceinline__ uint32_t query_position(const AttentionProblem& p, const Sequence& s, int t) {
  const int64_t start = p.bottom_right ? static_cast<int64_t>(s.S) - s.T : p.q_start;
  return static_cast<uint32_t>(start + p.step * t);
}
__device__ __forceinline__ uint32_t key_position(const AttentionProblem& p, int s) {
  return static_cast<uint32_t>((p.bottom_right ? 0 : p.k_start) + p.step * s);
}

// Whether the element of these positions is dropped.
__device__ __forceinline__ bool dropped(uint32_t query, uint32_t key, uint32_t stream, uint32_t threshold) {
  uint32_t c0 = key, c1 = query;
  philox(c0, c1, stream);
  return c0 < threshold;
}

// The same for four keys at once: long chains of multiplications hide each other. Bit i of the result is
// keys[i]'s.
__device__ __forceinline__ unsigned dropped_of_four(uint32_t query, const uint32_t (&keys)[4],
                                                    uint32_t stream, uint32_t threshold) {
  uint32_t c0[4] = {keys[0], keys[1], keys[2], keys[3]}, c1[4] = {query, query, query, query};
#pragma unroll 1  // sixteen of these unrolled would be most of a kernel
  for (int round = 0; round < 10; ++round) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t high = __umulhi(0xD256D193u, c0[i]), low = 0xD256D193u * c0[i];
      c0[i] = high ^ stream ^ c1[i];
      c1[i] = low;
    }
    stream += 0x9E3779B9u;
  }
  return (c0[0] < threshold ? 1u : 0u) | (c0[1] < threshold ? 2u : 0u) | (c0[2] < threshold ? 4u : 0u) |
         (c0[3] < threshold ? 8u : 0u);
}

// |position of query t - position of key s|.
__device__ __forceinline__ float distance(const Sequence& q, int64_t step, int t, int s) {
  const int apart = q.offset + static_cast<int>(step) * (t - s);
  return static_cast<float>(apart < 0 ? -apart : apart);
}

__device__ __forceinline__ float alibi_slope(const AttentionProblem& p, int b, int n) {
  return p.alibi_slopes != nullptr ? p.alibi_slopes[b * p.alibi_batch_stride + n] : 0.0f;
}

__device__ __forceinline__ float bias_at(const AttentionBias& bias, int64_t element) {
  if (bias.dtype == kFloat32) return static_cast<const float*>(bias.data)[element];
  const uint16_t bits = static_cast<const uint16_t*>(bias.data)[element];
  return bias.dtype == kBFloat16 ? ptx::unpack_bf16(bits) : ptx::unpack_f16(bits);
}

// The element of bias for query t and key 0; one key further is bias.key_stride further.
__device__ __forceinline__ int64_t bias_row(const AttentionBias& bias, int b, int n, int t) {
  return b * bias.batch_stride + n * bias.head_stride + t * bias.query_stride;
}

// ---- tiles of 16-bit elements in shared memory

// kColumns (64, 128, 256) elements a row; the 16-byte chunks of a row are exchanged by its number, so that
// the eight rows that one ldmatrix phase reads, one chunk of each, lie in different banks.
template <int kColumns>
struct Tile {
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kChunks = kColumns / 8;

  // Byte offset of the chunk that holds columns 8 * chunk ....
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }

  // Byte offset of the row that this lane gives to ldmatrix x4 for a 16x16 fragment at (0, 0): by lanes 0 ...
  // 31 its left and then its right half; or, `across`, its upper and then its lower half.
  static __device__ __forceinline__ int lane_offset(bool across) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    return across ? offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) : offset(lane % 16, lane / 16);
  }

  // The same for a fragment at (row, column), multiples of 8 and 16, of a tile whose offset, a multiple of
  // 128, is in lane_offset already. With constants it costs one exclusive or; nothing for all tiles has to
  // stay in registers.
  static __device__ __forceinline__ int fragment_offset(int lane_offset, int row, int column) {
    return (lane_offset ^ (column / 8 % 8 << 4)) + row * kRowBytes + column / 64 * 128;
  }

  // Starts to copy rows [0, kRows) by kThreads threads. source(row) returns where row begins in global
  // memory, or null for a row of zeros; columns from `size` on become 0.
  template <int kRows, int kThreads, class Source>
  static __device__ __forceinline__ void copy_async(unsigned char* tile, int size, const Source& source) {
    static_assert(kThreads % kChunks == 0 && kRows % (kThreads / kChunks) == 0, "every thread copies alike");
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int first = static_cast<int>(threadIdx.x) / kChunks;
#pragma unroll
    for (int i = 0; i < kRows / (kThreads / kChunks); ++i) {
      const int row = first + i * (kThreads / kChunks);
      const uint16_t* begin = source(row);
      ptx::copy_async_16(tile + offset(row, chunk), begin + chunk * 8, begin != nullptr && chunk * 8 < size);
    }
  }
};

// Fragments of mma_m16n8k16 from a tile at (row, column), multiples of 8 and 16.
// A: rows x columns = m x k.
template <class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int column) {
  ptx::load_matrix_x4(a, tile + T::fragment_offset(T::lane_offset(false), row, column));
}

// A from a tile that holds it transposed: rows x columns = k x m.
template <class T>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], const unsigned char* tile, int row,
                                             int column) {
  ptx::load_matrix_trans_x4(a, tile + T::fragment_offset(T::lane_offset(true), row, column));
}

// Two B fragments, of n = row ... row + 7 and row + 8 ... row + 15: rows x columns = n x k.
template <class T>
__device__ __forceinline__ void load_b_pair(uint32_t (&b)[2][2], const unsigned char* tile, int row,
                                            int column) {
  uint32_t r[4];
  ptx::load_matrix_x4(r, tile + T::fragment_offset(T::lane_offset(true), row, column));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Two B fragments, of n = column ... and column + 8 ..., from a tile with rows x columns = k x n.
template <class T>
__device__ __forceinline__ void load_b_pair_trans(uint32_t (&b)[2][2], const unsigned char* tile, int row,
                                                  int column) {
  uint32_t r[4];
  ptx::load_matrix_trans_x4(r, tile + T::fragment_offset(T::lane_offset(false), row, column));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// ---- reductions over the four lanes that share a fragment's row, in a fixed order

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace pypar::cuda
