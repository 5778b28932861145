// Attention forward for bfloat16 and float16 on tensor cores (mma.sync, so every GPU from sm_80 on), after
// FlashAttention-2 (Dao, arXiv 2307.08691): each thread block keeps a block of query rows, reads the keys and
// values that these rows see block by block, and carries a softmax in base 2 along (Milakov and Gimelshein,
// arXiv 1805.02867).
//
// Keys and values pass through one ring of tiles in shared memory, K0 V0 K1 V1 ..., filled by cp.async
// kStages - 1 tiles ahead: one barrier a tile both makes a tile visible and says that the slot of the tile
// before is free.
#pragma once

#include "attention/cuda/thread_block.cuh"

namespace pypar::cuda {

constexpr int kWorkBytes = 64;

// How the work of one thread block is laid out. Four warps, always: at 255 registers a thread two such blocks
// fill an SM's 65536, and a warp with 32 rows uses a key fragment twice, which halves what ldmatrix reads: 16
// rows would ask for the whole bandwidth of shared memory on sm_80 and twice that on sm_90.
//
//   kHead  rows x keys  registers a thread  shared memory         blocks per SM by shared memory
//                       for out + scores
//   64     128 x 64      64 + 64            16 + 4 x  8 = 48 KiB  sm_80 3, sm_90 4, sm_120 2
//   128    128 x 64     128 + 64            32 + 3 x 16 = 80 KiB  sm_80 2, sm_90 2, sm_120 1
//   256     64 x 32     128 + 16            32 + 3 x 16 = 80 KiB  sm_80 2, sm_90 2, sm_120 1
// kHead 256 has no registers for 32 rows a warp. More keys at a time would save barriers, but cost the second
// block.
//
// kFewRows: at most 16 rows, as in decoding, where keys and values are read once and bandwidth is all that
// counts. The four warps share the rows and split each block of keys; their sums are added at the end, in
// warp order.
//   64      16 x 64      32 + 8              2 + 4 x  8 = 34 KiB  sm_80 4, sm_90 6, sm_120 2
//   128     16 x 64      64 + 8              4 + 3 x 16 = 52 KiB  sm_80 3, sm_90 4, sm_120 1
//   256     16 x 64     128 + 8              8 + 2 x 32 = 72 KiB  sm_80 2, sm_90 3, sm_120 1
template <class T, int kHeadSize, bool kFew, bool kModifies>
struct ForwardShape {
  using Type = T;
  static constexpr int kHead = kHeadSize;
  static constexpr bool kFewRows = kFew;
  static constexpr bool kModified = kModifies;  // scores are more than scale * q . k, scale > 0
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTilesM = kFew || kHead == 256 ? 1 : 2;  // of 16 rows, a warp
  static constexpr int kRows = kFew ? 16 : kWarps * kTilesM * 16;
  static constexpr int kKeys = !kFew && kHead >= (kModified ? 128 : 256) ? 32 : 64;  // a block
  static constexpr int kWarpKeys = kFew ? kKeys / kWarps : kKeys;                    // of them a warp's
  static constexpr int kTilesN = kWarpKeys / 8;
  static constexpr int kStages = kHead == 64 ? 4 : kHead == 256 && kFew ? 2 : 3;
  static constexpr bool kKeepQ = kHead == 64 && !kFew && !kModified;  // registers hold the query fragments
  using Rows = Tile<kHead>;
  static constexpr int kQueryBytes = kRows * Rows::kRowBytes;
  static constexpr int kTileBytes = kKeys * Rows::kRowBytes;
  static constexpr int kTableBytes = kWorkBytes + kRows * 4;
  static constexpr int kSharedBytes = kQueryBytes + kStages * kTileBytes + kTableBytes;
  static constexpr int kCombinePitch = kHead + 8;  // floats; half-warps then write to different banks
  static constexpr int kCombineBytes = kWarps * 16 * (kCombinePitch + 2) * 4;
  static_assert(!kFew || kCombineBytes <= kSharedBytes - kTableBytes,
                "the warps' sums take the place of the tiles");
};

// What the host decides.
struct ForwardSchedule {
  int blocks_per_head;
  int num_splits;      // of the keys; then the results below are completed by a second kernel
  float* partial_out;  // [split][row_index][Hv]
  float* partial_lse;  // [split][row_index]
  int64_t num_rows;    // of one split
};

// A reference value, subtracted from a row's scores, follows the row's maximum only when that has grown by
// more than this (in powers of two): most blocks then need no rescaling, and a sum stays below 2^8 times what
// it would be.
constexpr float kSlack = 8.0f;

// The sums of `count` rows of one thread.
template <int kCount>
struct RunningSoftmax {
  float reference[kCount];  // in units of the raw scores
  float sum[kCount];        // of 2^((score - reference) * factor), this thread's columns only
};

// What a thread block works on. It lies in shared memory, from where the rare paths read it: registers are
// scarce.
struct ForwardWork {
  Sequence sequence;
  int b, g, group;
  int first_row, num_rows;     // of this block; rows of the sequence
  int first_block, end_block;  // of keys
  int split;
};
static_assert(sizeof(ForwardWork) <= kWorkBytes, "a table follows");

template <class Shape>
__device__ __forceinline__ bool find_work(const AttentionProblem& p, const ForwardSchedule& schedule,
                                          ForwardWork& work) {
  const unsigned splits = static_cast<unsigned>(schedule.num_splits);
  const unsigned index = blockIdx.x / splits;
  work.split = static_cast<int>(blockIdx.x - index * splits);
  work.group = static_cast<int>(p.N / p.G);
  const BlockPlace place = locate(p.cu_seqlens_q, static_cast<int>(p.B), static_cast<int>(p.G), work.group,
                                  Shape::kRows, schedule.blocks_per_head, index, p.right != kUnbounded);
  if (!place.exists) return false;
  work.b = place.sequence;
  work.g = place.head;
  work.sequence = sequence_of(p, work.b);
  work.first_row = place.block * Shape::kRows;
  work.num_rows = work.sequence.T * work.group;
  const int first_query = work.first_row / work.group;
  const int last_query = (smaller(work.first_row + Shape::kRows, work.num_rows) - 1) / work.group;
  const int first_key = first_seen(work.sequence, first_query);
  const int end_key = end_seen(work.sequence, last_query);
  work.first_block = first_key / Shape::kKeys;
  work.end_block = end_key > first_key ? (end_key + Shape::kKeys - 1) / Shape::kKeys : work.first_block;
  if (splits > 1) {
    const int each = (work.end_block - work.first_block + schedule.num_splits - 1) / schedule.num_splits;
    work.first_block = smaller(work.first_block + work.split * each, work.end_block);
    work.end_block = smaller(work.first_block + each, work.end_block);
  }
  return true;
}

// Positions of the block's rows; they lie behind the work. Rows after the last repeat it.
__device__ __forceinline__ int* row_positions(ForwardWork& work) {
  return reinterpret_cast<int*>(reinterpret_cast<unsigned char*>(&work) + kWorkBytes);
}

// Position and head of a row of the block.
__device__ __forceinline__ void find_row(const ForwardWork& work, int row, int& t, int& n) {
  t = row_positions(const_cast<ForwardWork&>(work))[row];
  const int r = smaller(work.first_row + row, work.num_rows - 1);
  n = work.g * work.group + (r - t * work.group);
}

// Address of element 0 of query t and head n.
template <class Element>
__device__ __forceinline__ Element* query_row(const AttentionTensor& x, const ForwardWork& work, int t,
                                              int n) {
  return static_cast<Element*>(x.data) + work.b * x.batch_stride +
         (work.sequence.first_query + static_cast<int64_t>(t)) * x.position_stride + n * x.head_stride;
}

template <class Shape>
__device__ __forceinline__ void copy_queries(const AttentionProblem& p, const ForwardWork& work,
                                             unsigned char* tile) {
  Shape::Rows::template copy_async<Shape::kRows, Shape::kThreads>(
      tile, static_cast<int>(p.H), [&](int row) -> const uint16_t* {
        int t, n;
        find_row(work, row, t, n);
        return work.first_row + row < work.num_rows ? query_row<const uint16_t>(p.q, work, t, n) : nullptr;
      });
}

// A thread's part of copying blocks of keys, or of values, one after the other.
template <class Shape>
struct KeyCopier {
  static constexpr int kChunks = Shape::Rows::kChunks;
  static constexpr int kStep = Shape::kThreads / kChunks;  // rows that all threads copy at once
  const uint16_t* from;  // this thread's chunk of its first row in the next block
  int num_left;          // rows from there on to the last key; none for columns beyond the head's size

  __device__ __forceinline__ KeyCopier(const AttentionTensor& x, int64_t size, const ForwardWork& work) {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int row = work.first_block * Shape::kKeys + static_cast<int>(threadIdx.x) / kChunks;
    from = static_cast<const uint16_t*>(x.data) + work.b * x.batch_stride + work.g * x.head_stride +
           (work.sequence.first_key + static_cast<int64_t>(row)) * x.position_stride + chunk * 8;
    num_left = chunk * 8 < size ? work.sequence.S - row : 0;
  }

  __device__ __forceinline__ void copy_block(const AttentionTensor& x, unsigned char* tile) {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks, row = static_cast<int>(threadIdx.x) / kChunks;
#pragma unroll
    for (int i = 0; i < Shape::kKeys / kStep; ++i) {
      ptx::copy_async_16(tile + Shape::Rows::offset(row + i * kStep, chunk),
                         from + i * kStep * x.position_stride, i * kStep < num_left);
    }
    from += Shape::kKeys * x.position_stride;
    num_left -= Shape::kKeys;
  }
};

// scores = Q K^T of a warp's rows and keys; `keys` is the lane's offset in shared memory of the first of
// them, `queries` of its rows. The last quarter of a padded head is left out where it is empty.
template <class Shape>
__device__ __forceinline__ void multiply_keys(
    float (&scores)[Shape::kTilesM][Shape::kTilesN][4],
    const uint32_t (&kept)[Shape::kKeepQ ? Shape::kTilesM : 1][Shape::kKeepQ ? Shape::kHead / 16 : 1][4],
    const unsigned char* memory, int queries, int keys, int head_size) {
  using Rows = typename Shape::Rows;
#pragma unroll
  for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
    for (int n = 0; n < Shape::kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[i][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < Shape::kHead / 16; ++k) {
    if (k == Shape::kHead / 16 * 3 / 4 && head_size <= Shape::kHead * 3 / 4) break;
    uint32_t a[Shape::kTilesM][4];
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; ++i) {
      if constexpr (Shape::kKeepQ) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = kept[i][k][e];
      } else {
        ptx::load_matrix_x4(a[i], memory + Rows::fragment_offset(queries, i * 16, k * 16));
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kTilesN; n += 2) {
      uint32_t r[4];
      ptx::load_matrix_x4(r, memory + Rows::fragment_offset(keys, n * 8, k * 16));
      const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i) {
        ptx::mma_m16n8k16(scores[i][n], a[i], b[0], scores[i][n], typename Shape::Type{});
        ptx::mma_m16n8k16(scores[i][n + 1], a[i], b[1], scores[i][n + 1], typename Shape::Type{});
      }
    }
  }
}

// sums += P V for columns [kBegin, kEnd) of V, P the fragments of a warp's rows and keys.
template <class Shape, int kBegin, int kEnd>
__device__ __forceinline__ void multiply_columns(float (&sums)[Shape::kTilesM][Shape::kHead / 8][4],
                                                 const uint32_t (&p)[Shape::kTilesM][Shape::kTilesN / 2][4],
                                                 const unsigned char* memory, int values) {
#pragma unroll
  for (int k = 0; k < Shape::kTilesN / 2; ++k) {
#pragma unroll
    for (int n = kBegin / 8; n < kEnd / 8; n += 2) {
      uint32_t r[4];
      ptx::load_matrix_trans_x4(r, memory + Shape::Rows::fragment_offset(values, k * 16, n * 8));
      const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i) {
        ptx::mma_m16n8k16(sums[i][n], p[i][k], b[0], sums[i][n], typename Shape::Type{});
        ptx::mma_m16n8k16(sums[i][n + 1], p[i][k], b[1], sums[i][n + 1], typename Shape::Type{});
      }
    }
  }
}

// sums += P V, without the last quarter of the columns where it is empty.
template <class Shape>
__device__ __forceinline__ void multiply_values(float (&sums)[Shape::kTilesM][Shape::kHead / 8][4],
                                                const uint32_t (&p)[Shape::kTilesM][Shape::kTilesN / 2][4],
                                                const unsigned char* memory, int values, int head_size) {
  constexpr int kMost = Shape::kHead * 3 / 4;
  multiply_columns<Shape, 0, kMost>(sums, p, memory, values);
  if (head_size > kMost) multiply_columns<Shape, kMost, Shape::kHead>(sums, p, memory, values);
}

}  // namespace pypar::cuda
