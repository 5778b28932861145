// All-reduce between the GPUs of one node, over memory that each of them maps: what the host hands to the
// kernels, what a shared area holds, and why the protocol is right.
//
// Every rank has one area. Calls are numbered from 1; a number lives in the area itself, so that the host
// keeps none and a CUDA graph may replay a call. In call c a rank
//   1. copies its input into half c % 2 of its own data,
//   2. says so to every peer: it sets the peer's flag (c % 2, stage 0, block, own rank) to c, and waits until
//      its own flags of all peers are c,
//   3. one shot: reads that half of every area, sums in rank order and is done.
//      Two shots: sums slice `rank` alone, writes the sum over its own part of the slice, which nobody else
//      reads in this stage, says so with stage 1, waits likewise, and gathers every slice from its rank.
//
// Visibility. A block's threads write, meet at a barrier, and then one thread for each peer sets a flag with
// st.release.sys; that thread waits for the peer with ld.acquire.sys, and the block meets again. By the PTX
// memory model barriers and release/acquire pairs of system scope compose (causality order), so all that the
// peer's block wrote before its barrier is seen by all threads behind this block's. Nothing hangs on which
// thread of the block wrote or reads; block b does rely on the peer's block b alone, so an element belongs to
// the same block on all ranks and in both stages.
//
// No closing barrier. A rank writes half c % 2 again in call c + 2, which its stream starts after its call
// c + 1 has ended, so after it has seen all peers' flags at c + 1. A peer sets that flag in its call c + 1,
// which its stream starts when its call c has ended, with all its reads. So nobody still reads what is
// overwritten. With one half this fails, as nothing orders c + 1 after a slow peer's reads of c.
//
// Flags. A waiting thread asks for equality: the number may wrap around. A word is set again by call c + 2,
// whose rank has seen this rank's flag at c + 1, set after this rank left call c: so no flag is overwritten
// before it was seen. With one set of flags a fast peer's c + 1 could hide c, and the wait never ended.
//
// A wait that ends by the time-out. The rank notes whom it waited for, counts the call as not made, and marks
// its area: its later calls write nothing. A peer that comes late thus still finds the input of that very
// call; the call after it ends in its own time-out.
//
// tests/comm/allreduce/test_protocol.py enumerates the interleavings of this protocol.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/registry.h"

namespace pypar {

constexpr int kMaxRanks = 8;
constexpr int kMaxBlocks = 64;
constexpr int kStages = 2;

// The beginning of an area, zeroed before any peer maps it.
struct AllReduceSignals {
  // The last call's number, once for each block of the largest grid. Of a grid of n blocks, block b reads its
  // own and, when it is done, sets those of b, b + n, b + 2n, ...: so all are equal whatever the grids were.
  uint32_t calls[kMaxBlocks];
  uint32_t failed;  // 1: a wait ended by the time-out, later calls do nothing
  uint32_t unused[63];
  uint32_t flags[2][kStages][kMaxBlocks][kMaxRanks];  // set by the rank of the last index
};

constexpr int64_t kDataOffset = 16384;
static_assert(sizeof(AllReduceSignals) <= kDataOffset, "signals lie before the data");

// What a rank that waited in vain leaves, in host memory that its device can write.
struct AllReduceError {
  uint32_t state;  // 1: the rest is valid
  uint32_t peer;   // the rank waited for
  uint32_t call;
  uint32_t stage;
};

struct AllReduceGroup {
  unsigned char* areas[kMaxRanks];  // by rank
  AllReduceError* error;
  int64_t half_bytes;   // of one half of the data
  uint64_t timeout_ns;  // 0: never
  int rank;
  int num_ranks;
};

struct AllReduceCall {
  AllReduceGroup group;
  const void* x;
  void* y;
  int64_t numel;
  int two_shot;
};

// residual_out = round(sum + residual); out = round(h * rsqrt(mean(h^2) + eps) * weight), h = residual_out.
struct AllReduceNormCall {
  AllReduceGroup group;
  const void* x;
  const void* residual;
  const void* weight;
  void* residual_out;
  void* out;
  int64_t rows;
  int64_t D;
  float eps;
  int two_shot;
};

// Where and how a call runs.
struct AllReduceLaunch {
  int64_t max_bytes;  // that the areas were made for
  void* stream;
  int device;
  int dtype;       // ElementType
  int num_blocks;  // 0: by size
};

}  // namespace pypar
