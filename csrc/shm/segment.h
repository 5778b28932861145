// Memory that the ranks of one host share, and how one rank waits for another.
//
// The segment is a memory file without a name. For every rank it holds a line of flags, two data buffers, and
// a byte stream to every other rank.
//
// Collectives advance in steps. In step s a rank writes its buffer s % 2 and then sets its flag to s
// (release); another rank reads that buffer after it has seen the flag at s or beyond (acquire). A flag at s
// also says that the rank has read all it wanted of steps before s. So a rank may write in step s once all
// flags are at s - 1 or beyond: nobody can still be reading buffer s % 2, last written in step s - 2. No step
// ends with a barrier. tests/comm/process_group/test_shm_protocol.py enumerates the interleavings of this
// protocol.
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

namespace pypar::shm {

using Word = std::atomic<uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 4, "a flag is one machine word");

// What a rank says of the call whose first step this is; all ranks must say the same, apart from `bytes`
// where a collective takes different sizes.
struct Description {
  int32_t kind;        // Kind
  int32_t op;          // ReduceOp, or 0
  int32_t dtype;       // -1 where bytes are moved only
  int32_t root;        // -1 where there is none
  int64_t bytes;       // of this rank's contribution
  int64_t offset = 0;  // in memory that the ranks share
  int32_t memory = 0;  // the number of that memory, 0 where the tensor is not in any
};

struct alignas(128) RankLine {
  Word step;      // the flag
  Word joined;    // 1 from when the rank holds its lock
  Word sleepers;  // how many wait for it with a futex
  Description description[2];
  alignas(64) Word bell;  // counts what happened on byte streams to and from this rank
  Word bell_sleepers;
};

// A stream of bytes from one rank to another; `written` and `read` count bytes, modulo 2^32.
struct alignas(64) Stream {
  Word written;
  alignas(64) Word read;
};

struct Header {
  Word failed;  // 1 + the rank that met the first error; others need not wait for it
};

struct Sizes {
  int num_ranks;
  int64_t buffer_bytes;  // of one data buffer
  int64_t stream_bytes;  // of one byte stream; a power of two

  int64_t lines_at() const { return 128; }
  int64_t streams_at() const { return lines_at() + num_ranks * int64_t{sizeof(RankLine)}; }
  int64_t buffers_at() const {
    return round_up_page(streams_at() + num_ranks * num_ranks * int64_t{sizeof(Stream)});
  }
  int64_t stream_data_at() const { return buffers_at() + num_ranks * 2 * buffer_bytes; }
  int64_t total() const { return stream_data_at() + num_ranks * num_ranks * stream_bytes; }
  static int64_t round_up_page(int64_t n) { return (n + 4095) / 4096 * 4096; }
};

// Maps the segment and knows where everything is. Owns fd, unless the constructor throws. Holds a lock on its
// rank's byte of the file for as long as the process lives: the kernel drops it when the process ends,
// however it ends. (It would also drop it if the process closed another descriptor of this file: there must
// be no other.)
class Segment {
 public:
  Segment(int fd, int rank, const Sizes& sizes) : sizes_(sizes), rank_(rank), fd_(fd) {
    memory_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(sizes.total()), PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0));
    if (memory_ == MAP_FAILED) {
      throw std::runtime_error("mapping " + std::to_string(sizes.total()) + " bytes of shared memory failed");
    }
    struct flock lock = byte_of(rank, F_WRLCK);
    if (fcntl(fd_, F_SETLK, &lock) != 0) {
      munmap(memory_, static_cast<size_t>(sizes.total()));
      throw std::runtime_error("rank " + std::to_string(rank) + " of this group is taken by another process");
    }
    line(rank).joined.store(1, std::memory_order_release);
  }
  ~Segment() {
    munmap(memory_, static_cast<size_t>(sizes_.total()));
    close(fd_);
  }
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int rank() const { return rank_; }
  int num_ranks() const { return sizes_.num_ranks; }
  const Sizes& sizes() const { return sizes_; }
  Header& header() const { return *reinterpret_cast<Header*>(memory_); }
  RankLine& line(int rank) const { return reinterpret_cast<RankLine*>(memory_ + sizes_.lines_at())[rank]; }
  char* buffer(int rank, uint32_t step) const {
    return memory_ + sizes_.buffers_at() + (rank * 2 + static_cast<int>(step % 2)) * sizes_.buffer_bytes;
  }
  Stream& stream(int from, int to) const {
    return reinterpret_cast<Stream*>(memory_ + sizes_.streams_at())[from * sizes_.num_ranks + to];
  }
  char* stream_data(int from, int to) const {
    return memory_ + sizes_.stream_data_at() + (from * sizes_.num_ranks + to) * sizes_.stream_bytes;
  }
  // False if the rank's process has ended. One that has not come yet counts as alive.
  bool is_alive(int rank) const {
    if (rank == rank_ || line(rank).joined.load(std::memory_order_acquire) == 0) return true;
    struct flock lock = byte_of(rank, F_WRLCK);
    return fcntl(fd_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
  }

 private:
  static struct flock byte_of(int rank, short type) {
    struct flock lock{};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = rank;
    lock.l_len = 1;
    return lock;
  }

  Sizes sizes_;
  int rank_, fd_;
  char* memory_;
};

using Clock = std::chrono::steady_clock;

inline void futex_wait(Word& word, uint32_t seen, std::chrono::nanoseconds most) {
  const timespec timeout{static_cast<time_t>(most.count() / 1000000000),
                         static_cast<long>(most.count() % 1000000000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

inline void futex_wake_all(Word& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Sets a word that others may wait for. The fence orders the store before the look at `sleepers`, as the
// sleeper's orders its count before its look at the word: one of the two sees the other.
inline void publish(Word& word, uint32_t value, Word& sleepers) {
  word.store(value, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_relaxed) != 0) futex_wake_all(word);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Pure spinning costs a scheduler quantum where ranks share a core, and sleeping at once costs a wake-up of
// tens of microseconds: look, and give the core away again and again, for a while; then sleep, and look after
// the others from time to time. An all_reduce of 1 KiB took 33 us this way for 2 ranks on one core and 110 us
// for 4 ranks on 2 cores; 53 and 220 us where the core was kept for 30 us before the sleep.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr auto kNap = std::chrono::milliseconds(100);

// Waits until ready(word's value) is true. After every nap calls look(), which throws to give up.
template <class Ready, class Look>
void await(Word& word, Word& sleepers, const Ready& ready, const Look& look) {
  if (ready(word.load(std::memory_order_acquire))) return;
  const auto until = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready(word.load(std::memory_order_acquire))) return;
      relax();
    }
    sched_yield();
  } while (Clock::now() < until);
  for (;;) {
    sleepers.fetch_add(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const uint32_t seen = word.load(std::memory_order_acquire);
    if (!ready(seen)) futex_wait(word, seen, kNap);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (ready(word.load(std::memory_order_acquire))) return;
    look();
  }
}

// a has reached b; both wrap around.
inline bool reached(uint32_t a, uint32_t b) { return static_cast<int32_t>(a - b) >= 0; }

}  // namespace pypar::shm
