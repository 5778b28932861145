// Launches, the scheduler, barriers.
#include "machine.h"

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>

#include "devices.h"
#include "fiber.h"
#include "memory.h"
#include "report.h"

#ifdef SIMT_SANITIZED
#  include <pthread.h>
#  include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Machine machine;
Thread* current = nullptr;

const char* operation_name(Operation operation) {
  static const char* const names[] = {"nothing",     "__syncthreads", "__syncwarp", "a shuffle", "a vote",
                                      "a reduction", "__activemask",  "ldmatrix",   "mma"};
  return names[static_cast<int>(operation)];
}

uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

namespace {

constexpr const char* kDivergent = "divergent barrier";

// The lane after `cursor` among `lanes`, which are not empty, in the chosen order.
unsigned next_lane(const Warp& warp, uint32_t lanes) {
  if (machine.options.thread_order == Order::kReverse) {
    const uint32_t below = lanes & ((1u << warp.cursor) - 1);
    return 31 - static_cast<unsigned>(__builtin_clz(below != 0 ? below : lanes));
  }
  unsigned from = (warp.cursor + 1) % kWarpSize;
  if (machine.options.thread_order == Order::kRandom) from = next_random() % kWarpSize;
  const uint32_t above = lanes & (~0u << from);
  return static_cast<unsigned>(__builtin_ctz(above != 0 ? above : lanes));
}

// The next thread to run, or null if none can.
Thread* next_thread(unsigned warp_index) {
  const unsigned num_warps = machine.block->num_warps;
  const bool reverse = machine.options.thread_order == Order::kReverse;
  if (machine.options.thread_order == Order::kRandom) warp_index = next_random() % num_warps;
  for (unsigned i = 0; i < num_warps; ++i) {
    Warp& warp = machine.warps[(warp_index + (reverse ? num_warps - i : i)) % num_warps];
    if (warp.runnable == 0 && warp.asking != 0) answer_active_mask(warp);
    if (warp.runnable == 0) continue;
    const unsigned lane = next_lane(warp, warp.runnable);
    warp.runnable &= ~(1u << lane);
    warp.cursor = lane;
    return &lane_of(warp, lane);
  }
  return nullptr;
}

void switch_to(void** save, void** save_fake_stack, Thread* next) {
  current = next;
  void* to = next != nullptr ? next->stack_pointer : machine.main_stack_pointer;
#ifdef SIMT_SANITIZED
  void* main_stack = nullptr;
  size_t main_bytes = 0;
  if (next == nullptr) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &main_stack, &main_bytes);
    pthread_attr_destroy(&attributes);
  }
  __sanitizer_start_switch_fiber(save_fake_stack, next != nullptr ? next->stack : main_stack,
                                 next != nullptr ? kStackBytes : main_bytes);
  simt_switch_stack(save, to);
  const void* from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(*save_fake_stack, &from, &bytes);
#else
  (void)save_fake_stack;
  simt_switch_stack(save, to);
#endif
}

// Where all threads that have not returned wait, for a deadlock's report.
[[noreturn]] void report_deadlock() {
  std::map<std::string, std::pair<unsigned, const Thread*>> places;
  for (unsigned i = 0; i < machine.block->num_threads; ++i) {
    const Thread& t = machine.threads[i];
    if (t.exited) continue;
    auto& place = places[std::string(operation_name(t.wait.operation)) + " at " + source_line(t.wait.site)];
    if (place.first++ == 0) place.second = &t;
  }
  std::string text = "no thread can go on:";
  const void* site = nullptr;
  for (const auto& [where, threads] : places) {
    text += (text.back() == ':' ? " " : "; ") + std::to_string(threads.first) +
            " (the first: " + thread_name(*threads.second) + ") wait in " + where;
    site = threads.second->wait.site;
  }
  if (machine.block->num_exited > 0)
    text += "; " + std::to_string(machine.block->num_exited) + " have returned";
  stop_with(kDivergent, text, site);
}

void thread_entry() {
#ifdef SIMT_SANITIZED
  const void* from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
#endif
  machine.call->run();
  Thread& t = *current;
  machine.idle_polls = 0;
  Block& block = *machine.block;
  Warp& warp = machine.warps[t.warp];
  t.exited = true;
  block.exited_thread = t.number;
  ++block.num_exited;
  if (block.num_at_barrier > 0) {
    const Thread& first = machine.threads[block.barrier_thread];
    stop_with(
        kDivergent,
        thread_name(first) + " waits in __syncthreads at $1, " + thread_name(t) + " has returned without it",
        first.wait.site);
  }
  warp.alive &= ~(1u << t.lane);
  lane_exited(warp);
  Thread* next = next_thread(t.warp);
  if (next == nullptr && block.num_exited < block.num_threads) report_deadlock();
  switch_to(&t.stack_pointer, &t.fake_stack, next);
  __builtin_unreachable();
}

void start_threads(Resident& resident, const Call& call) {
  Block& block = *machine.block;
  const dim3 size = call.block;
  block.num_threads = size.x * size.y * size.z;
  block.num_warps = (block.num_threads + kWarpSize - 1) / kWarpSize;
  block.num_exited = block.num_at_barrier = 0;
  if (resident.threads.size() < block.num_threads) resident.threads.resize(block.num_threads);
  machine.threads = resident.threads.data();
  for (unsigned i = 0; i < block.num_warps; ++i) machine.warps[i] = Warp{};
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Thread& t = machine.threads[i];
    if (t.stack == nullptr) t.stack = allocate_stack(kStackBytes);
    t.stack_pointer = start_fiber(t.stack, kStackBytes, &thread_entry);
    t.fake_stack = nullptr;
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.number = i;
    t.warp = static_cast<uint8_t>(i / kWarpSize);
    t.lane = static_cast<uint8_t>(i % kWarpSize);
    t.exited = false;
    t.wait = Wait{};
    t.copies.clear();
    t.groups = 0;
    t.clock = 1;
    t.acquired.reset();
    std::fill_n(t.seen, kWarpSize, 0u);
    Warp& warp = machine.warps[t.warp];
    warp.alive |= 1u << t.lane;
    warp.runnable = warp.alive;
    warp.stamp = 1;
    warp.cursor = machine.options.thread_order == Order::kReverse ? 0 : kWarpSize - 1;
  }
}

}  // namespace

void Knowledge::join(const Knowledge& other) {
  for (const auto& [block, epoch] : other.blocks) {
    uint32_t& mine = blocks[block];
    if (mine < epoch) mine = epoch;
  }
  for (const Point& point : other.points) {
    if (!covers(owner_of(point.epoch), point.epoch, point.number, point.stamp)) points.push_back(point);
  }
}

bool Knowledge::covers(uint32_t block, uint32_t epoch, unsigned number, uint32_t stamp) const {
  const auto found = blocks.find(block);
  if (found != blocks.end() && epoch < found->second) return true;
  for (const Point& point : points) {
    if (point.epoch == epoch && point.number == number && point.stamp >= stamp) return true;
  }
  return false;
}

void advance_epoch() {
  machine.block->epoch = ++machine.epoch;
  machine.owners.push_back(machine.block->id);
}

void begin_launches() {
  clear_findings();
  machine.stopped = false;
  machine.random = machine.options.seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du;
  if (machine.random == 0) machine.random = 1;
  machine.blocks.clear();
  machine.owners.clear();
  machine.launch_epoch = machine.epoch + 1;
}

void activate(Resident& resident) {
  machine.threads = resident.threads.data();
  machine.warps = resident.warps;
  machine.block = &resident.block;
  machine.call = resident.call;
  machine.device = resident.device;
  use_shared(*resident.memory);
  allow_arguments(resident.call, resident.call->bytes);
}

void start_block(Resident& resident, const Call& call, uint64_t number) {
  resident.call = &call;
  if (resident.memory == nullptr) resident.memory = std::make_shared<SharedMemory>();
  activate(resident);
  Block& block = *machine.block;
  block.grid = call.grid;
  block.size = call.block;
  const uint64_t row = number / call.grid.x;
  block.index = {static_cast<unsigned>(number % call.grid.x), static_cast<unsigned>(row % call.grid.y),
                 static_cast<unsigned>(row / call.grid.y)};
  block.id = static_cast<uint32_t>(machine.blocks.size());
  machine.blocks.push_back({block.size, block.index, machine.device});
  block.known = Knowledge{};
  advance_epoch();
  block.first_epoch = block.epoch;
  ++machine.counters.blocks;
  start_threads(resident, call);
  poison_shared(call.shared_bytes);
  resident.warp = machine.options.thread_order == Order::kReverse ? block.num_warps - 1 : 0;
}

void resume_threads(Resident& resident) {
  Thread* next = next_thread(resident.warp);
  if (next == nullptr) report_deadlock();
  resident.warp = (next->warp + 1) % machine.block->num_warps;
  switch_to(&machine.main_stack_pointer, &machine.main_fake_stack, next);
}

void give_turn_back(Thread& t) {
  release(t);
  switch_to(&t.stack_pointer, &t.fake_stack, nullptr);
}

void check_call(const Call& call) {
  const auto refuse = [](const std::string& text) { throw std::runtime_error("a launch asks for " + text); };
  const uint64_t threads = uint64_t{call.block.x} * call.block.y * call.block.z;
  if (threads == 0 || threads > kMaxThreads || call.block.z > 64) {
    refuse(std::to_string(threads) + " threads a block; a GPU takes 1 to 1024, at most 64 of them along z");
  }
  if (call.grid.x == 0 || call.grid.y == 0 || call.grid.z == 0 || call.grid.x > 0x7fffffff ||
      call.grid.y > 65535 || call.grid.z > 65535) {
    refuse("a grid of " + block_name({call.grid.x, call.grid.y, call.grid.z}) +
           "; a GPU takes 1 to 2147483647, 65535, 65535");
  }
  if (call.shared_bytes + static_shared_bytes() > kMaxSharedBytes) {
    refuse(std::to_string(call.shared_bytes) + " bytes of dynamic shared memory; a block has at most " +
           std::to_string(kMaxSharedBytes) + ", static ones included");
  }
}

void block_thread(Thread& t) {
  Thread* next = next_thread(t.warp);
  if (next == nullptr) report_deadlock();
  if (next != &t) {
    switch_to(&t.stack_pointer, &t.fake_stack, next);
  }
}

void release(Thread& t) {
  t.wait.operation = Operation::kNone;
  machine.warps[t.warp].runnable |= 1u << t.lane;
}

void yield_thread(Thread& t) {
  release(t);
  block_thread(t);
}

void stop_launch() {
  machine.stopped = true;
  if (current == nullptr) throw std::runtime_error(findings_text());
  void *unused, *unused_fake_stack;
  switch_to(&unused, &unused_fake_stack, nullptr);
  __builtin_unreachable();
}

int sync_threads(Barrier kind, int predicate) {
  const void* site = __builtin_return_address(0);
  Thread& t = *current;
  Block& block = *machine.block;
  t.wait = {Operation::kSyncThreads, static_cast<uint8_t>(kind), ~0u, site};
  t.in[0] = predicate != 0;
  if (block.num_exited > 0) {
    stop_with(kDivergent,
              thread_name(t) + " waits in __syncthreads at $1, " +
                  thread_name(machine.threads[block.exited_thread]) + " has returned without it",
              site);
  }
  if (block.num_at_barrier++ == 0) block.barrier_thread = t.number;
  const Thread& first = machine.threads[block.barrier_thread];
  if (first.wait.variant != t.wait.variant || !same_source(first.wait.site, site)) {
    stop_with(
        kDivergent,
        thread_name(t) + " waits in __syncthreads at $1, " + thread_name(first) + " in another one at $2",
        site, first.wait.site);
  }
  if (block.num_at_barrier < block.num_threads) {
    block_thread(t);
    return static_cast<int>(t.out[0]);
  }
  unsigned count = 0;
  for (unsigned i = 0; i < block.num_threads; ++i) count += machine.threads[i].in[0];
  if (kind == Barrier::kAnd) count = count == block.num_threads;
  if (kind == Barrier::kOr) count = count != 0;
  block.num_at_barrier = 0;
  advance_epoch();
  join_acquired(block);
  machine.idle_polls = 0;
  ++machine.counters.barriers;
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Thread& other = machine.threads[i];
    other.out[0] = count;
    if (&other != &t) release(other);
  }
  t.wait.operation = Operation::kNone;
  if (machine.options.thread_order == Order::kRandom) yield_thread(t);
  before_access(t);
  return static_cast<int>(count);
}

void trap() {
  stop_with("trap", thread_name(*current) + " stops the kernel at $1", __builtin_return_address(0));
}

uint3 thread_index() { return current->index; }
uint3 block_index() { return machine.block->index; }
dim3 block_size() { return machine.block->size; }
dim3 grid_size() { return machine.block->grid; }
unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(machine.shared); }

void run_call(const Call& call) {
  if (current != nullptr)
    throw std::runtime_error("a kernel launches a kernel; the host runtime has no such launches");
  static Resident resident;
  machine.call = &call;
  check_call(call);
  begin_launches();
  ++machine.counters.launches;
  const uint64_t num_blocks = uint64_t{call.grid.x} * call.grid.y * call.grid.z;
  std::vector<uint64_t> order(num_blocks);
  for (uint64_t i = 0; i < num_blocks; ++i) order[i] = i;
  if (machine.options.block_order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (machine.options.block_order == Order::kRandom) {
    for (uint64_t i = num_blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  for (uint64_t i = 0; i < num_blocks && !machine.stopped; ++i) {
    start_block(resident, call, order[i]);
    resume_threads(resident);
  }
  if (has_findings()) throw std::runtime_error(findings_text());
}

}  // namespace simt
