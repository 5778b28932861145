// Bytes that lie in several places of one rank's memory and travel one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pypar::shm {

// One rank's part of a tensor that is spread over the ranks.
struct Part {
  char* data;
  int64_t bytes;
};

class Pieces {
 public:
  explicit Pieces(std::vector<Part> parts) : parts_(std::move(parts)) {
    for (const Part& part : parts_) {
      begins_.push_back(bytes_);
      bytes_ += part.bytes;
    }
  }

  int64_t bytes() const { return bytes_; }

  // The bytes [at, at + size), where they lie in one place; otherwise null.
  char* at(int64_t at, int64_t size) const {
    const size_t index = find(at);
    if (index == parts_.size() || at + size > begins_[index] + parts_[index].bytes) return nullptr;
    return parts_[index].data + (at - begins_[index]);
  }

  // to = the bytes [at, at + size)
  void read(int64_t at, int64_t size, char* to) const {
    each(at, size, [&](char* here, int64_t done, int64_t count) {
      if (to + done != here) std::memcpy(to + done, here, static_cast<size_t>(count));
    });
  }

  // The bytes [at, at + size) = from
  void write(int64_t at, int64_t size, const char* from) const {
    each(at, size, [&](char* here, int64_t done, int64_t count) {
      if (from + done != here) std::memcpy(here, from + done, static_cast<size_t>(count));
    });
  }

  // The bytes = those of another, of the same number.
  void take(const Pieces& from) const {
    from.each(0, bytes_, [&](char* here, int64_t done, int64_t count) { write(done, count, here); });
  }

 private:
  size_t find(int64_t at) const {
    return static_cast<size_t>(std::upper_bound(begins_.begin(), begins_.end(), at) - begins_.begin()) - 1;
  }

  template <class Body>
  void each(int64_t at, int64_t size, const Body& body) const {
    for (int64_t done = 0; done < size;) {
      const size_t index = find(at + done);  // of empty pieces the last one that begins here
      const int64_t skipped = at + done - begins_[index];
      const int64_t count = std::min(size - done, parts_[index].bytes - skipped);
      body(parts_[index].data + skipped, done, count);
      done += count;
    }
  }

  std::vector<Part> parts_;
  std::vector<int64_t> begins_;
  int64_t bytes_ = 0;
};

}  // namespace pypar::shm
