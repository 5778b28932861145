// Reading and writing of files in the background: what is asked for, and who does it.
#pragma once

#include <cerrno>
#include <cstdint>
#include <memory>
#include <vector>

namespace pypar::file_io {

// Something that was asked for, in pieces.
struct Request {
  int64_t num_bytes = 0;
  int64_t done_bytes = 0;
  int num_left = 0;  // pieces
  int error = 0;     // errno of the first piece that failed
};

// Pieces are done at once, in any order. A piece that the system did in part goes on with its rest; one that
// is at the end of the file is over.
struct Piece {
  std::shared_ptr<Request> request;
  int fd;
  bool is_write;
  char* data;
  int64_t num_bytes, offset;
};

constexpr int64_t kPieceBytes = 4 << 20;

// Does pieces. Only one thread at a time calls start and wait.
class Worker {
 public:
  virtual ~Worker() = default;
  virtual void start(const std::vector<Piece>& pieces) = 0;
  // Returns when no piece of the request is left.
  virtual void wait(Request& request) = 0;
};

// What a piece has come to when the system has done `result` bytes of it, or failed with -result. True: it is
// over.
inline bool advance(Piece& piece, int64_t result) {
  if (result == -EINTR || result == -EAGAIN) return false;
  Request& request = *piece.request;
  if (result < 0) {
    if (request.error == 0) request.error = static_cast<int>(-result);
  } else {
    request.done_bytes += result;
    piece.data += result;
    piece.offset += result;
    piece.num_bytes -= result;
    if (result > 0 && piece.num_bytes > 0) return false;
  }
  --request.num_left;
  return true;
}

}  // namespace pypar::file_io
