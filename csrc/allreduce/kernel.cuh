// The kernels of the all-reduce between GPUs; protocol.h says what they rely on. Tests break each of these
// rules (planted) and must find the fault.
#pragma once

#include "allreduce/protocol.h"
#include "core/cuda_launch.h"
#include "core/planted.h"
#include "core/ptx.h"

namespace pypar::cuda {

#ifdef PYPAR_SIMT
constexpr int kReduceThreads = 64;  // several grids run at once there, every thread with a stack
#else
constexpr int kReduceThreads = 512;
#endif
constexpr int kReduceWarps = kReduceThreads / 32;

struct Float32Tag {};

__host__ __device__ __forceinline__ int64_t smaller_count(int64_t a, int64_t b) { return a < b ? a : b; }

// 16 bytes of elements.
template <class Type>
struct Pack {
  using Bits = uint16_t;
  static constexpr int kSize = 8;
  static __device__ __forceinline__ void unpack(const uint32_t (&words)[4], float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = ptx::unpack(static_cast<uint16_t>(words[i]), Type{});
      values[2 * i + 1] = ptx::unpack(static_cast<uint16_t>(words[i] >> 16), Type{});
    }
  }
  static __device__ __forceinline__ void pack(const float (&values)[kSize], uint32_t (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = ptx::pack(values[2 * i], values[2 * i + 1], Type{});
  }
};

template <>
struct Pack<Float32Tag> {
  using Bits = uint32_t;
  static constexpr int kSize = 4;
  static __device__ __forceinline__ void unpack(const uint32_t (&words)[4], float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(words[i]);
  }
  static __device__ __forceinline__ void pack(const float (&values)[kSize], uint32_t (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(values[i]);
  }
};

__device__ __forceinline__ void load_words(const void* from, int64_t index, uint32_t (&words)[4]) {
  const uint4 loaded = static_cast<const uint4*>(from)[index];
  words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
}

__device__ __forceinline__ void store_words(void* to, int64_t index, const uint32_t (&words)[4]) {
  static_cast<uint4*>(to)[index] = make_uint4(words[0], words[1], words[2], words[3]);
}

// A tensor of the caller: any address that is a multiple of its element's size, any number of elements.
template <class Type>
struct Ragged {
  using Bits = typename Pack<Type>::Bits;
  static constexpr int kSize = Pack<Type>::kSize;
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(Bits));

  int64_t numel;
  bool aligned;

  __device__ __forceinline__ Ragged(const void* pointer, int64_t numel_)
      : numel(numel_), aligned((reinterpret_cast<uintptr_t>(pointer) & 15) == 0) {}

  // Zeros beyond the end.
  __device__ __forceinline__ void load(const void* from, int64_t index, uint32_t (&words)[4]) const {
    if (aligned && (index + 1) * kSize <= numel) return load_words(from, index, words);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int64_t at = index * kSize + i;
      const uint32_t bits = at < numel ? static_cast<const Bits*>(from)[at] : Bits{0};
      if (i % kPerWord == 0) words[i / kPerWord] = 0;
      words[i / kPerWord] |= bits << (i % kPerWord * 16);
    }
  }

  __device__ __forceinline__ void store(void* to, int64_t index, const uint32_t (&words)[4]) const {
    if (aligned && (index + 1) * kSize <= numel) return store_words(to, index, words);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int64_t at = index * kSize + i;
      if (at < numel) {
        static_cast<Bits*>(to)[at] = static_cast<Bits>(words[i / kPerWord] >> (i % kPerWord * 16));
      }
    }
  }
};

// ---- meeting the peers

// A rank's call as its block sees it.
struct Meeting {
  const AllReduceGroup& group;
  AllReduceSignals* own;
  uint32_t call;
  int64_t data_offset;  // of this call's half in every area
  bool failed;          // an earlier call did: then nothing is written, since a late peer may still read

  __device__ __forceinline__ explicit Meeting(const AllReduceGroup& g)
      : group(g), own(reinterpret_cast<AllReduceSignals*>(g.areas[g.rank])) {
    call = own->calls[blockIdx.x] + 1;
    data_offset = kDataOffset + (planted("one buffer") ? 0 : call % 2) * g.half_bytes;
    failed = __syncthreads_or(threadIdx.x == 0 && ptx::load_relaxed_system(&own->failed) != 0) != 0;
  }

  __device__ __forceinline__ unsigned char* data(int rank) const { return group.areas[rank] + data_offset; }

  __device__ __forceinline__ uint32_t* flag(int of, int stage, int from) const {
    auto* signals = reinterpret_cast<AllReduceSignals*>(group.areas[of]);
    return &signals->flags[planted("one set") ? 0 : call % 2][stage][blockIdx.x][from];
  }

  // What this block's threads wrote before is seen by the peers' blocks of this number behind their meeting,
  // and the other way round. False, on all threads, when a peer did not come.
  __device__ __forceinline__ bool meet(int stage) {
    if (!planted("no barrier")) __syncthreads();
    const int peer = static_cast<int>(threadIdx.x);
    bool late = false;
    if (peer < group.num_ranks) {
      uint32_t* const theirs = flag(peer, stage, group.rank);
      planted("no release") ? ptx::store_relaxed_system(theirs, call)
                            : ptx::store_release_system(theirs, call);
      late = !wait(flag(group.rank, stage, peer));
      if (late) report(peer, stage);
    }
    return __syncthreads_or(late) == 0;
  }

  __device__ __forceinline__ bool wait(const uint32_t* word) const {
    const uint64_t start = ptx::time_ns();
    for (;;) {
      const uint32_t seen =
          planted("no acquire") ? ptx::load_relaxed_system(word) : ptx::load_acquire_system(word);
      if (seen == call) return true;
      if (group.timeout_ns != 0 && ptx::time_ns() - start > group.timeout_ns) return false;
    }
  }

  // The first of the rank's waits to end in vain tells the host.
  __device__ __forceinline__ void report(int peer, int stage) const {
    if (atomicCAS(&own->failed, 0u, 1u) != 0u) return;
    group.error->peer = static_cast<uint32_t>(peer);
    group.error->call = call;
    group.error->stage = static_cast<uint32_t>(stage);
    ptx::store_release_system(&group.error->state, 1);
  }

  // Behind the last meeting: the next launch reads the number.
  __device__ __forceinline__ void leave() const {
    for (unsigned i = blockIdx.x + threadIdx.x * gridDim.x; i < kMaxBlocks; i += gridDim.x * blockDim.x) {
      own->calls[i] = call;
    }
  }
};

// The sum over ranks, in rank order, of 16 bytes of every area. All loads are made before the first addition.
template <class Type>
__device__ __forceinline__ void sum_ranks(const Meeting& m, int64_t index, float (&sum)[Pack<Type>::kSize]) {
  uint32_t words[kMaxRanks][4];
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (r < m.group.num_ranks) load_words(m.data(r), index, words[r]);
  }
  Pack<Type>::unpack(words[0], sum);
#pragma unroll
  for (int r = 1; r < kMaxRanks; ++r) {
    if (r < m.group.num_ranks) {
      float values[Pack<Type>::kSize];
      Pack<Type>::unpack(words[r], values);
#pragma unroll
      for (int i = 0; i < Pack<Type>::kSize; ++i) sum[i] += values[i];
    }
  }
}

// y = the sum of all ranks' x. Items of 16 bytes; with two shots they are cut into a slice for each rank, and
// what is said of index j goes for item j of every slice.
template <class Type>
__global__ void __launch_bounds__(kReduceThreads, 1)
    allreduce_kernel(const __grid_constant__ AllReduceCall a) {
  constexpr int kSize = Pack<Type>::kSize;
  const AllReduceGroup& g = a.group;
  Meeting m(g);
  if (m.failed) return;
  const Ragged<Type> x(a.x, a.numel), y(a.y, a.numel);
  const int64_t items = (a.numel + kSize - 1) / kSize;
  const int num_slices = a.two_shot != 0 ? g.num_ranks : 1;
  const int64_t slice = (items + num_slices - 1) / num_slices;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t words[4];
  float sum[kSize];
  for (int s = 0; s < num_slices; ++s) {
    const int64_t end = smaller_count(items, (s + 1) * slice);
    for (int64_t i = s * slice + first; i < end; i += step) {
      x.load(a.x, i, words);
      store_words(m.data(g.rank), i, words);
    }
  }
  if (!m.meet(0)) return;
  const int mine = a.two_shot != 0 ? g.rank : 0;
  const int64_t end = smaller_count(items, (mine + 1) * slice);
  for (int64_t i = mine * slice + first; i < end; i += step) {
    sum_ranks<Type>(m, i, sum);
    Pack<Type>::pack(sum, words);
    if (a.two_shot != 0) {
      store_words(m.data(g.rank), i, words);
    } else {
      y.store(a.y, i, words);
    }
  }
  if (a.two_shot != 0) {
    if (!m.meet(1)) return;
    for (int s = 0; s < num_slices; ++s) {
      const int64_t slice_end = smaller_count(items, (s + 1) * slice);
      const int64_t start = planted("another block's items") ? step - 1 - first : first;
      for (int64_t i = s * slice + start; i < slice_end; i += step) {
        load_words(m.data(s), i, words);
        y.store(a.y, i, words);
      }
    }
  }
  m.leave();
}

// The sum over the block's threads, in an order that is always the same. `partial` is rewritten two calls
// later at the earliest, when all threads have read it.
__device__ __forceinline__ float sum_block(float value, float* partial) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kReduceWarps; ++i) sum += partial[i];
  return sum;
}

// The fused form's rows, as a block's threads share them.
template <class Type>
struct NormRows {
  static constexpr int kSize = Pack<Type>::kSize;
  const AllReduceNormCall& a;
  const Meeting& m;
  int items;  // of a row

  // residual_out of one item.
  __device__ __forceinline__ void add_residual(int64_t index, uint32_t (&words)[4]) const {
    float sum[kSize], residual[kSize];
    sum_ranks<Type>(m, index, sum);
    load_words(a.residual, index, words);
    Pack<Type>::unpack(words, residual);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] += residual[i];
    Pack<Type>::pack(sum, words);
  }

  // Every thread keeps its items of the row in `kept` between the sum of squares and the scaling.
  template <class Get>
  __device__ __forceinline__ void normalise(int64_t row, uint4* kept, float* partial, const Get& get) const {
    uint32_t words[4];
    float h[kSize], weight[kSize], squares = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < items; i += blockDim.x) {
      get(row * items + i, words);
      store_words(kept, i, words);
      store_words(a.residual_out, row * items + i, words);
      Pack<Type>::unpack(words, h);
#pragma unroll
      for (int e = 0; e < kSize; ++e) squares += h[e] * h[e];
    }
    const float scale = rsqrtf(sum_block(squares, partial) / static_cast<float>(a.D) + a.eps);
    for (int i = static_cast<int>(threadIdx.x); i < items; i += blockDim.x) {
      load_words(kept, i, words);
      Pack<Type>::unpack(words, h);
      load_words(a.weight, i, words);
      Pack<Type>::unpack(words, weight);
#pragma unroll
      for (int e = 0; e < kSize; ++e) h[e] = h[e] * scale * weight[e];
      Pack<Type>::pack(h, words);
      store_words(a.out, row * items + i, words);
    }
  }
};

// All-reduce, residual and rms_norm. A block works on whole rows; with two shots they are cut into a slice
// for each rank, which adds the residual there, and every rank normalises all rows itself: out follows from
// residual_out, so only that is gathered.
template <class Type>
__global__ void __launch_bounds__(kReduceThreads, 1)
    allreduce_rms_norm_kernel(const __grid_constant__ AllReduceNormCall a) {
  PYPAR_DYNAMIC_SHARED(memory);
  auto* kept = reinterpret_cast<uint4*>(memory);
  const AllReduceGroup& g = a.group;
  Meeting m(g);
  if (m.failed) return;
  const NormRows<Type> rows{a, m, static_cast<int>(a.D) / Pack<Type>::kSize};
  auto* partial = reinterpret_cast<float*>(kept + rows.items);
  const int num_slices = a.two_shot != 0 ? g.num_ranks : 1;
  const int64_t slice = (a.rows + num_slices - 1) / num_slices;
  uint32_t words[4];
  // body(row, how many rows came before) for this block's rows of slices [from, until).
  const auto for_rows = [&](int from, int until, const auto& body) {
    int count = 0;
    for (int s = from; s < until; ++s) {
      const int64_t end = smaller_count(a.rows, (s + 1) * slice);
      for (int64_t row = s * slice + blockIdx.x; row < end; row += gridDim.x) body(row, count++, s);
    }
  };
  for_rows(0, num_slices, [&](int64_t row, int, int) {
    for (int i = static_cast<int>(threadIdx.x); i < rows.items; i += blockDim.x) {
      load_words(a.x, row * rows.items + i, words);
      store_words(m.data(g.rank), row * rows.items + i, words);
    }
  });
  if (!m.meet(0)) return;
  if (a.two_shot == 0) {
    for_rows(0, 1, [&](int64_t row, int count, int) {
      rows.normalise(row, kept, partial + count % 2 * kReduceWarps,
                     [&](int64_t index, uint32_t (&w)[4]) { rows.add_residual(index, w); });
    });
  } else {
    for_rows(g.rank, g.rank + 1, [&](int64_t row, int, int) {
      for (int i = static_cast<int>(threadIdx.x); i < rows.items; i += blockDim.x) {
        rows.add_residual(row * rows.items + i, words);
        store_words(m.data(g.rank), row * rows.items + i, words);
      }
    });
    if (!m.meet(1)) return;
    for_rows(0, num_slices, [&](int64_t row, int count, int s) {
      rows.normalise(row, kept, partial + count % 2 * kReduceWarps,
                     [&](int64_t index, uint32_t (&w)[4]) { load_words(m.data(s), index, w); });
    });
  }
  m.leave();
}

// Reads `count` words of a peer's memory as the kernels above do.
static __global__ void peer_read_kernel(const uint32_t* from, uint32_t* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = ptx::load_acquire_system(from + i);
}

}  // namespace pypar::cuda
