#include "devices.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>

#include "memory.h"
#include "report.h"
#include "shadow.h"

namespace simt {

namespace {

// A store that other devices do not see yet. While the device has its turn, memory holds the new bytes and
// `other` the old ones; else the other way round.
struct Store {
  uintptr_t address;
  uint8_t bytes;
  unsigned char other[16];
  uint32_t epoch, stamp;
  unsigned number;

  void swap() {
    unsigned char kept[16];
    auto* const memory = reinterpret_cast<unsigned char*>(address);
    std::memcpy(kept, memory, bytes);
    std::memcpy(memory, other, bytes);
    std::memcpy(other, kept, bytes);
  }
};

struct Device {
  std::vector<Store> stores;  // in the order in which they were made
  std::vector<std::unique_ptr<Resident>> running;
  Knowledge known;      // at the end of its last kernel
  unsigned weight = 1;  // how often it gets a turn
};

std::vector<Device> devices;
unsigned turn = ~0u;                        // the device whose view memory shows; ~0: what all see
std::map<const void*, Knowledge> released;  // with the value that the word holds
std::vector<std::unique_ptr<Resident>> spare;
std::vector<std::shared_ptr<Call>> calls;  // all of this run, of which findings may tell

constexpr uint64_t kPatience = 20000;  // polls of a machine in which nothing else happens, until time flies
constexpr uint64_t kEndless = 200000;  // until nothing will ever happen

void show(unsigned device) {
  if (turn == device) return;
  if (turn != ~0u) {
    auto& stores = devices[turn].stores;
    for (auto store = stores.rbegin(); store != stores.rend(); ++store) store->swap();
  }
  turn = device;
  if (turn != ~0u) {
    for (Store& store : devices[turn].stores) store.swap();
  }
}

// Makes stores of the device that has its turn visible to all: those that `chosen` names, and those before
// them to the same bytes, which can no longer be seen.
template <class Chosen>
void publish(std::vector<Store>& stores, const Chosen& chosen) {
  std::set<uintptr_t> places;  // units of 16 bytes: what a store touches lies in one or two
  std::vector<Store> kept;
  for (size_t i = stores.size(); i-- > 0;) {
    const Store& store = stores[i];
    const uintptr_t first = store.address / 16, last = (store.address + store.bytes - 1) / 16;
    if (chosen(i) || places.count(first) != 0 || places.count(last) != 0) {
      places.insert({first, last});
    } else {
      kept.push_back(store);
    }
  }
  stores.assign(kept.rbegin(), kept.rend());
}

// Any store may become visible at any moment.
void publish_some(Device& device) {
  if (device.stores.empty() || next_random() % 4 != 0) return;
  const size_t chosen = next_random() % device.stores.size();
  publish(device.stores, [&](size_t i) { return i == chosen; });
}

bool is_random() { return machine.options.block_order == Order::kRandom; }

// Another block may get a turn.
void let_others_run(Thread& t) { devices.empty() ? yield_thread(t) : give_turn_back(t); }

void start_kernel(unsigned index, const std::shared_ptr<Call>& call) {
  Device& device = devices[index];
  check_call(*call);
  ++machine.counters.launches;
  calls.push_back(call);
  const uint64_t blocks = uint64_t{call->grid.x} * call->grid.y * call->grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    if (spare.empty()) spare.push_back(std::make_unique<Resident>());
    Resident& resident = *device.running.emplace_back(std::move(spare.back()));
    spare.pop_back();
    resident.device = index;
    start_block(resident, *call, i);
    resident.block.known = device.known;
    put_shared(*resident.memory);
  }
}

// The end of a kernel is seen by the device's next one; its stores are seen by all.
void end_block(Device& device, size_t at) {
  Resident& resident = *device.running[at];
  resident.block.known.blocks[resident.block.id] = ~0u;
  join_acquired(resident.block);
  // Other blocks of this kernel do not see it.
  auto ended = std::move(device.running[at]);
  device.running.erase(device.running.begin() + static_cast<std::ptrdiff_t>(at));
  device.known.join(ended->block.known);
  spare.push_back(std::move(ended));
  if (device.running.empty()) device.stores.clear();
}

// Which device gets the next turn, of those that run something.
unsigned choose_device(uint64_t turns) {
  // For a while one device may be much slower than another.
  if (is_random() && turns % 256 == 0) {
    for (Device& device : devices) device.weight = 1u << (next_random() % 4 * 3);
  }
  const bool reverse = machine.options.block_order == Order::kReverse;
  uint64_t total = 0;
  for (const Device& device : devices) total += device.running.empty() ? 0 : device.weight;
  uint64_t drawn = is_random() ? next_random() % total : turns % total;
  for (unsigned i = 0; i < devices.size(); ++i) {
    const auto index = static_cast<unsigned>(reverse ? devices.size() - 1 - i : i);
    if (devices[index].running.empty()) continue;
    if (drawn < devices[index].weight) return index;
    drawn -= devices[index].weight;
  }
  throw std::logic_error("no device runs");
}

void take_turn(uint64_t turns) {
  const unsigned index = choose_device(turns);
  Device& device = devices[index];
  const size_t at = (is_random() ? next_random() : turns / devices.size()) % device.running.size();
  Resident& resident = *device.running[at];
  show(index);
  activate(resident);
  resume_threads(resident);
  put_shared(*resident.memory);
  if (machine.stopped) throw std::runtime_error(findings_text());
  if (is_random()) publish_some(device);
  if (has_ended(resident)) end_block(device, at);
}

void forget() {
  show(~0u);
  for (Device& device : devices) {
    for (auto& resident : device.running) spare.push_back(std::move(resident));
  }
  devices.clear();
  released.clear();
}

}  // namespace

void before_access(Thread& t) {
  if (!devices.empty() && is_random() && next_random() % 32 == 0) give_turn_back(t);
}

void delay_store(const Thread& t, const void* address, size_t bytes) {
  if (devices.empty()) return;
  Store store{reinterpret_cast<uintptr_t>(address),
              static_cast<uint8_t>(bytes),
              {},
              machine.block->epoch,
              t.clock,
              t.number};
  std::memcpy(store.other, address, bytes);
  devices[machine.device].stores.push_back(store);
}

void join_acquired(Block& block) {
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Thread& t = machine.threads[i];
    if (t.acquired != nullptr) block.known.join(*t.acquired);
    t.acquired.reset();
  }
}

void run_devices(unsigned num_devices, const NextCall& next) {
  if (current != nullptr)
    throw std::runtime_error("a kernel launches a kernel; the host runtime has no such launches");
  begin_launches();
  devices = std::vector<Device>(num_devices);
  calls.clear();
  machine.idle_polls = 0;
  try {
    for (uint64_t turns = 0;; ++turns) {
      bool any = false;
      for (unsigned i = 0; i < num_devices; ++i) {
        if (devices[i].running.empty()) {
          show(~0u);
          if (const auto call = next(i)) start_kernel(i, call);
        }
        any |= !devices[i].running.empty();
      }
      if (!any) break;
      take_turn(turns);
    }
  } catch (...) {
    forget();
    throw;
  }
  forget();
  if (has_findings()) throw std::runtime_error(findings_text());
}

void atomic_access(const void* address, size_t bytes) {
  Thread& t = *current;
  let_others_run(t);
  check_access(t, address, bytes, Access::kAtomic, __builtin_return_address(0));
}

void store_system(uint32_t* word, uint32_t value, bool release) {
  Thread& t = *current;
  before_access(t);
  check_access(t, word, sizeof *word, Access::kAtomic, __builtin_return_address(0));
  machine.idle_polls = 0;
  released.erase(word);
  if (release) {
    const Block& block = *machine.block;
    if (!devices.empty()) {
      auto& stores = devices[machine.device].stores;
      publish(stores,
              [&](size_t i) { return ordered(t, stores[i].epoch, stores[i].number, stores[i].stamp); });
    }
    Knowledge known = block.known;
    if (t.acquired != nullptr) known.join(*t.acquired);
    known.blocks[block.id] = block.epoch;
    known.points.push_back({block.epoch, t.clock, t.number});
    t.clock = ++machine.warps[t.warp].stamp;
    released[word] = std::move(known);
  }
  *word = value;
  // What was stored before and is not visible yet is best missed now.
  if (!devices.empty() && is_random() && next_random() % 2 == 0) give_turn_back(t);
}

uint32_t load_system(const uint32_t* word, bool acquire) {
  Thread& t = *current;
  const void* site = __builtin_return_address(0);
  if (++machine.idle_polls > kEndless) {
    stop_with("endless wait",
              thread_name(t) + " reads a word at $1 again and again, and nothing else happens", site);
  }
  let_others_run(t);
  check_access(t, word, sizeof *word, Access::kAtomic, site);
  const auto found = released.find(word);
  if (acquire && found != released.end()) {
    if (t.acquired == nullptr) t.acquired = std::make_unique<Knowledge>();
    t.acquired->join(found->second);
  }
  return *word;
}

uint64_t time_ns() {
  const uint64_t idle = machine.idle_polls;
  const uint64_t doubled = idle < kPatience ? 0 : (idle - kPatience) / 1000;
  return machine.time_ns += uint64_t{1000} << (doubled < 40 ? doubled : 40);
}

}  // namespace simt
