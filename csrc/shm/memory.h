// Memory that all ranks of a group allocated together, so that a collective on it needs no copies.
//
// One memory file without a name holds a part of equal size for each rank, in rank order; every rank maps all
// of it. Pages are committed when they are first touched, and given back when the last rank has unmapped
// them.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "shm/segment.h"

namespace pypar::shm {

class Memory {
 public:
  // The descriptor stays the caller's. `number`, from 1, is this memory's on all ranks, and no other's.
  Memory(int fd, int rank, int num_ranks, int64_t part_bytes, int32_t number)
      : part_bytes_(part_bytes), rank_(rank), num_ranks_(num_ranks), number_(number) {
    void* const memory =
        mmap(nullptr, static_cast<size_t>(total()), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
      throw std::runtime_error("mapping " + std::to_string(total()) +
                               " bytes of memory shared between ranks failed: " + std::strerror(errno));
    }
    memory_ = static_cast<char*>(memory);
  }
  ~Memory() { munmap(memory_, static_cast<size_t>(total())); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  int32_t number() const { return number_; }
  int64_t part_bytes() const { return part_bytes_; }
  int64_t total() const { return part_bytes_ * num_ranks_; }
  char* part(int rank) const { return memory_ + rank * part_bytes_; }
  char* mine() const { return part(rank_); }

 private:
  int64_t part_bytes_;
  int rank_, num_ranks_;
  int32_t number_;
  char* memory_;
};

// Where a tensor lies in shared memory; nowhere without `memory`.
struct Place {
  std::shared_ptr<Memory> memory;
  int64_t offset = 0;  // in this rank's part
};

// The group's memory that is still in use on this rank.
class Memories {
 public:
  std::shared_ptr<Memory> add(int fd, int rank, int num_ranks, int64_t part_bytes, int32_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto memory = std::make_shared<Memory>(fd, rank, num_ranks, part_bytes, number);
    for (auto it = known_.begin(); it != known_.end();) it = it->second.expired() ? known_.erase(it) : ++it;
    known_[memory->mine()] = memory;
    return memory;
  }

  Place find(const char* data, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto after = known_.upper_bound(data);
    if (after == known_.begin()) return {};
    auto memory = std::prev(after)->second.lock();
    if (!memory || data + bytes > memory->mine() + memory->part_bytes()) return {};
    const int64_t offset = data - memory->mine();
    return {std::move(memory), offset};
  }

 private:
  std::mutex mutex_;
  std::map<const char*, std::weak_ptr<Memory>> known_;  // by the address of this rank's part
};

}  // namespace pypar::shm
