// The machine that runs kernels: threads as fibers, warps, one block at a time; what memory.h, warp.cpp and
// report.h know of each other. Blocks run one after another, in a chosen order, on the calling OS thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simt.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
#ifdef SIMT_SANITIZED
constexpr size_t kStackBytes = 512 << 10;  // AddressSanitizer's frames are large
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
// What a block of sm_90 may have; static and dynamic shared memory together.
constexpr size_t kMaxSharedBytes = 227 << 10;

enum class Operation : uint8_t {
  kNone,
  kSyncThreads,
  kSyncWarp,
  kShuffle,
  kVote,
  kReduce,
  kActiveMask,
  kLoadMatrix,
  kMma,
};
const char* operation_name(Operation operation);

// What a thread waits for: the other threads of its block, or the lanes of `mask`, at the same instruction.
struct Wait {
  Operation operation = Operation::kNone;
  uint8_t variant = 0;  // which shuffle, which vote, ...
  uint32_t mask = 0;
  const void* site = nullptr;  // the return address in the kernel
};

// One cp.async under way.
struct Copy {
  char* shared;
  const char* global;
  uint32_t group;
  const void* site;
  bool valid;
};

struct Thread {
  void* stack_pointer;
  char* stack;  // its lowest address
  void* fake_stack;
  uint3 index;
  uint32_t number;  // in its block
  uint8_t warp, lane;
  bool exited;
  Wait wait;
  uint32_t in[12];  // operands of a warp's operation
  uint32_t out[4];  // its results
  uint32_t groups;  // of cp.async, committed
  std::vector<Copy> copies;
  // Vector clock over the lanes of the warp. An access is stamped with `clock`; it is ordered before another
  // lane's next access if that lane has seen this stamp. Between warps only the block's barrier orders, see
  // Block::epoch.
  uint32_t clock;
  uint32_t seen[kWarpSize];
};

struct Warp {
  uint32_t alive;     // lanes that exist and have not returned
  uint32_t runnable;  // lanes that can run, without the running one
  uint32_t waiting;   // lanes in a warp's operation
  uint32_t asking;    // lanes in __activemask, answered when no lane can run
  bool uniform;       // all that wait are in the operation `first`
  Wait first;
  uint32_t stamp;
  unsigned cursor;  // the lane that ran last
};

enum class Order : uint8_t { kLinear, kReverse, kRandom };

struct Options {
  Order block_order = Order::kLinear;
  Order thread_order = Order::kLinear;
  uint64_t seed = 0;
  bool early_copies =
      false;  // cp.async moves its data at once: what it overwrites too early is seen to change
  unsigned max_findings = 20;
};

struct Counters {
  uint64_t launches, blocks, barriers, warp_syncs, shuffles, mma, load_matrix, load_matrix_conflicts, copies;
};

struct Block {
  dim3 grid, size;
  uint3 index;
  unsigned num_threads, num_warps, num_exited, num_at_barrier;
  uint32_t exited_thread;   // one that has returned
  uint32_t barrier_thread;  // the first at the present barrier
  uint32_t first_epoch;
  uint32_t epoch;  // counts barriers, over all blocks and launches: earlier means ordered before
};

struct Machine {
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kWarpSize];
  Block block;
  const Call* call = nullptr;
  uint32_t launch_epoch = 1;  // the launch's first
  std::vector<std::pair<uint32_t, uint3>>
      blocks;  // first epoch and index of the launch's blocks, as they ran
  Options options;
  Counters counters{};
  uint64_t random = 1;
  void* main_stack_pointer = nullptr;
  void* main_fake_stack = nullptr;
  bool stopped = false;
  char* shared = nullptr;  // dynamic shared memory
};

extern Machine machine;
extern Thread* current;  // null outside kernels

// Lets others run until the wait that `t` is in has ended.
void block_thread(Thread& t);
// Marks the wait of a lane as ended; it runs when its turn comes.
void release(Thread& t);
void yield_thread(Thread& t);
// Gives up the launch: the kernel's threads never run again.
[[noreturn]] void stop_launch();
void run_call(const Call& call);  // throws std::runtime_error with the findings
uint64_t next_random();

// warp.cpp: what a warp does when all its lanes have come, also after one has returned.
void arrive(Thread& t, Operation operation, uint8_t variant, uint32_t mask, const void* site);
void lane_exited(Warp& warp);
void answer_active_mask(Warp& warp);
// tensor_core.cpp
void finish_load_matrix(Warp& warp);
void finish_mma(Warp& warp);

inline Thread& lane_of(const Warp& warp, unsigned lane) {
  return machine.threads[static_cast<unsigned>(&warp - machine.warps) * kWarpSize + lane];
}

}  // namespace simt
