// Files by io_uring (Linux 5.6 and later): requests and results pass through memory that is shared with the
// kernel, and no thread waits for the disk. Without liburing, whose part that is needed is this small.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <system_error>

#include "file_io/requests.h"

#if __has_include(<linux/io_uring.h>) && defined(__NR_io_uring_setup)
#  include <linux/io_uring.h>
#  define PYPAR_HAS_IO_URING 1
#endif

namespace pypar::file_io {

#ifdef PYPAR_HAS_IO_URING
// Memory that is shared with the kernel.
class Mapping {
 public:
  Mapping(int fd, size_t bytes, uint64_t offset) : bytes_(bytes) {
    memory_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (memory_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of io_uring");
  }
  ~Mapping() { munmap(memory_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  template <class T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_) + offset);
  }

 private:
  void* memory_;
  size_t bytes_;
};

struct Descriptor {
  int fd;
  ~Descriptor() { close(fd); }
};

inline int set_up(unsigned depth, io_uring_params* parameters) {
  std::memset(parameters, 0, sizeof(*parameters));
  const long fd = syscall(__NR_io_uring_setup, depth, parameters);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
  return static_cast<int>(fd);
}

class Ring : public Worker {
 public:
  explicit Ring(unsigned depth)
      : descriptor_{set_up(depth, &parameters_)},
        submissions_(descriptor_.fd, parameters_.sq_off.array + parameters_.sq_entries * sizeof(uint32_t),
                     IORING_OFF_SQ_RING),
        completions_(descriptor_.fd, parameters_.cq_off.cqes + parameters_.cq_entries * sizeof(io_uring_cqe),
                     IORING_OFF_CQ_RING),
        entries_(descriptor_.fd, parameters_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES),
        slots_(parameters_.sq_entries) {
    for (unsigned slot = 0; slot < slots_.size(); ++slot) free_.push_back(slot);
  }

  // What is in flight writes into memory of others.
  ~Ring() override {
    waiting_.clear();
    while (free_.size() < slots_.size() && reap(1)) {
    }
  }

  void start(const std::vector<Piece>& pieces) override {
    for (const Piece& piece : pieces) waiting_.push_back(piece);
    submit();
    reap(0);  // what has ended makes room
    submit();
  }

  void wait(Request& request) override {
    while (request.num_left > 0) {
      submit();
      if (!reap(1)) throw std::system_error(errno, std::generic_category(), "io_uring_enter");
    }
    submit();
  }

 private:
  using Counter = std::atomic<uint32_t>;

  void submit() {
    auto* tail = submissions_.at<Counter>(parameters_.sq_off.tail);
    const uint32_t mask = *submissions_.at<uint32_t>(parameters_.sq_off.ring_mask);
    uint32_t end = tail->load(std::memory_order_relaxed), count = 0;
    while (!waiting_.empty() && !free_.empty()) {
      const unsigned slot = free_.back();
      free_.pop_back();
      slots_[slot] = waiting_.front();
      waiting_.pop_front();
      const Piece& piece = slots_[slot];
      io_uring_sqe& entry = entries_.at<io_uring_sqe>(0)[slot];
      std::memset(&entry, 0, sizeof(entry));
      entry.opcode = piece.is_write ? IORING_OP_WRITE : IORING_OP_READ;
      entry.fd = piece.fd;
      entry.addr = reinterpret_cast<uint64_t>(piece.data);
      entry.len = static_cast<uint32_t>(piece.num_bytes);
      entry.off = static_cast<uint64_t>(piece.offset);
      entry.user_data = slot;
      submissions_.at<uint32_t>(parameters_.sq_off.array)[end & mask] = slot;
      ++end, ++count;
    }
    tail->store(end, std::memory_order_release);
    unsent_ += count;
    while (unsent_ > 0) {
      const long sent = syscall(__NR_io_uring_enter, descriptor_.fd, unsent_, 0, 0, nullptr, 0);
      if (sent > 0) {
        unsent_ -= static_cast<unsigned>(sent);
      } else if (errno == EAGAIN || errno == EBUSY) {
        if (!reap(1)) throw std::system_error(errno, std::generic_category(), "io_uring_enter");
      } else if (errno != EINTR) {
        throw std::system_error(errno, std::generic_category(), "io_uring_enter");
      }
    }
  }

  // Takes what has ended, after waiting for so many. False: the kernel refuses to wait.
  bool reap(unsigned least) {
    auto* head = completions_.at<Counter>(parameters_.cq_off.head);
    auto* tail = completions_.at<Counter>(parameters_.cq_off.tail);
    const uint32_t mask = *completions_.at<uint32_t>(parameters_.cq_off.ring_mask);
    uint32_t begin = head->load(std::memory_order_relaxed);
    while (least > 0 && begin == tail->load(std::memory_order_acquire)) {
      const long got =
          syscall(__NR_io_uring_enter, descriptor_.fd, 0, least, IORING_ENTER_GETEVENTS, nullptr, 0);
      if (got < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) return false;
    }
    for (; begin != tail->load(std::memory_order_acquire); ++begin) {
      const io_uring_cqe& ended = completions_.at<io_uring_cqe>(parameters_.cq_off.cqes)[begin & mask];
      const auto slot = static_cast<unsigned>(ended.user_data);
      if (!advance(slots_[slot], ended.res)) waiting_.push_front(slots_[slot]);
      slots_[slot].request.reset();
      free_.push_back(slot);
    }
    head->store(begin, std::memory_order_release);
    return true;
  }

  io_uring_params parameters_;
  Descriptor descriptor_;
  Mapping submissions_, completions_, entries_;
  std::vector<Piece> slots_;  // of entries: pieces that the kernel has
  std::vector<unsigned> free_;
  std::deque<Piece> waiting_;
  unsigned unsent_ = 0;
};

inline std::unique_ptr<Worker> make_ring(unsigned depth) { return std::make_unique<Ring>(depth); }

#else

inline std::unique_ptr<Worker> make_ring(unsigned) {
  throw std::system_error(ENOSYS, std::generic_category(), "io_uring_setup");
}

#endif

}  // namespace pypar::file_io
