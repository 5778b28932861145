// Files by threads that wait for the disk, where there is no io_uring.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "file_io/requests.h"

namespace pypar::file_io {

class Threads : public Worker {
 public:
  explicit Threads(unsigned num_threads) {
    for (unsigned i = 0; i < num_threads; ++i) threads_.emplace_back([this] { run(); });
  }

  ~Threads() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.clear();
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void start(const std::vector<Piece>& pieces) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const Piece& piece : pieces) waiting_.push_back(piece);
    }
    wake_.notify_all();
  }

  void wait(Request& request) override {
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, [&] { return request.num_left == 0; });
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      Piece piece = waiting_.front();
      waiting_.pop_front();
      for (bool is_over = false; !is_over;) {
        lock.unlock();
        const int64_t count = piece.is_write ? pwrite(piece.fd, piece.data, piece.num_bytes, piece.offset)
                                             : pread(piece.fd, piece.data, piece.num_bytes, piece.offset);
        const int64_t result = count < 0 ? -static_cast<int64_t>(errno) : count;
        lock.lock();
        is_over = advance(piece, result);
      }
      ended_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, ended_;
  std::deque<Piece> waiting_;
  std::vector<std::thread> threads_;
  bool stop_ = false;
};

inline std::unique_ptr<Worker> make_threads(unsigned num_threads) {
  return std::make_unique<Threads>(num_threads);
}

}  // namespace pypar::file_io
