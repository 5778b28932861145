// The machine that runs kernels: threads as fibers, warps, blocks; what memory.h, warp.cpp, report.h and
// devices.h know of each other. On the calling OS thread blocks run one after another, in a chosen order; or,
// with Options::concurrent, all blocks of the kernels of several devices by turns (devices.h).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
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

// What is ordered before a thread's next access, of other blocks: by release and acquire, and the ends of
// kernels.
struct Knowledge {
  struct Point {
    uint32_t epoch, stamp;
    unsigned number;
  };
  std::map<uint32_t, uint32_t> blocks;  // all accesses of this block in epochs before this one
  std::vector<Point> points;            // those of one thread in one epoch, up to a stamp

  void join(const Knowledge& other);
  bool covers(uint32_t block, uint32_t epoch, unsigned number, uint32_t stamp) const;
};

struct Thread {
  void* stack_pointer;
  char* stack = nullptr;  // its lowest address
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
  std::unique_ptr<Knowledge> acquired;  // since the block's last barrier
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
  bool concurrent = false;  // every stream is a device, and they run at the same time
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
  // Counts barriers, over all blocks and launches: an earlier one of the same block means ordered before.
  uint32_t epoch;
  uint32_t id;      // in Machine::blocks
  Knowledge known;  // by all of its threads
};

// What findings say of a block, also after its end.
struct BlockRecord {
  dim3 size;
  uint3 index;
  unsigned device;
};

struct SharedMemory;

// A block that has been started: all that changes when another one gets its turn.
struct Resident {
  std::vector<Thread> threads;
  Warp warps[kMaxThreads / kWarpSize];
  Block block{};
  const Call* call = nullptr;
  std::shared_ptr<SharedMemory> memory;
  unsigned device = 0;
  unsigned warp = 0;  // that ran last
};

struct Machine {
  // Of the resident that has its turn.
  Thread* threads = nullptr;
  Warp* warps = nullptr;
  Block* block = nullptr;
  const Call* call = nullptr;
  unsigned device = 0;

  uint32_t epoch = 0;            // the latest of all
  uint32_t launch_epoch = 1;     // what is earlier is over: launches, or sets of concurrent ones, before
  std::vector<uint32_t> owners;  // block ids, of the epochs since
  std::vector<BlockRecord> blocks;
  Options options;
  uint64_t time_ns = 0;
  uint64_t idle_polls = 0;  // since anything but waiting was done
  Counters counters{};
  uint64_t random = 1;
  void* main_stack_pointer = nullptr;
  void* main_fake_stack = nullptr;
  bool stopped = false;
  char* shared = nullptr;  // dynamic shared memory, of the resident that has its turn
};

extern Machine machine;
extern Thread* current;  // null outside kernels

// The block that an epoch since launch_epoch belongs to.
inline uint32_t owner_of(uint32_t epoch) { return machine.owners[epoch - machine.launch_epoch]; }
// Begins the next epoch of the machine's block.
void advance_epoch();
// What came before is over.
void begin_launches();

// Makes a resident of one block of a call, gives it the turn, and lets its threads run until all have
// returned or one gives the turn back.
void start_block(Resident& resident, const Call& call, uint64_t number);
void activate(Resident& resident);
void resume_threads(Resident& resident);
inline bool has_ended(const Resident& r) { return r.block.num_exited == r.block.num_threads; }
// Throws if no GPU could run it.
void check_call(const Call& call);
// Marks the running thread as able to run and gives the turn back.
void give_turn_back(Thread& t);

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
