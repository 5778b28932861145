// The Python side of file_io: contract in pypar/files/background.py.
#include "core/registry.h"

#ifdef PYPAR_BINDING

#  include <algorithm>
#  include <cerrno>
#  include <mutex>
#  include <string>
#  include <system_error>

#  include "file_io/ring.h"
#  include "file_io/threads.h"

namespace py = pybind11;

namespace pypar::file_io {

namespace {

class Queue {
 public:
  Queue(const std::string& kind, unsigned depth) {
    if (kind != "io_uring" && kind != "threads")
      throw py::value_error("kind '" + kind + "' must be io_uring or threads");
    worker_ = kind == "threads" ? make_threads(depth) : make_ring(depth);
  }

  std::shared_ptr<Request> start(bool is_write, int fd, uintptr_t data, int64_t num_bytes, int64_t offset) {
    auto request = std::make_shared<Request>();
    request->num_bytes = num_bytes;
    std::vector<Piece> pieces;
    for (int64_t begin = 0; begin < num_bytes; begin += kPieceBytes) {
      pieces.push_back(Piece{request, fd, is_write, reinterpret_cast<char*>(data) + begin,
                             std::min(kPieceBytes, num_bytes - begin), offset + begin});
    }
    request->num_left = static_cast<int>(pieces.size());
    if (!worker_) throw std::runtime_error("the queue is closed");
    py::gil_scoped_release unlocked;
    std::lock_guard<std::mutex> lock(mutex_);
    worker_->start(pieces);
    return request;
  }

  py::tuple wait(const std::shared_ptr<Request>& request) {
    if (!worker_) throw std::runtime_error("the queue is closed");
    {
      py::gil_scoped_release unlocked;
      std::lock_guard<std::mutex> lock(mutex_);
      worker_->wait(*request);
    }
    return py::make_tuple(request->done_bytes, request->error);
  }

  void close() {
    py::gil_scoped_release unlocked;
    std::lock_guard<std::mutex> lock(mutex_);
    worker_.reset();
  }

 private:
  std::mutex mutex_;
  std::unique_ptr<Worker> worker_;
};

}  // namespace
}  // namespace pypar::file_io

PYPAR_BIND(file_io) {
  using pypar::file_io::Queue;
  using pypar::file_io::Request;
  py::class_<Request, std::shared_ptr<Request>>(module, "FileRequest");
  py::class_<Queue>(module, "FileQueue")
      .def(py::init([](const std::string& kind, unsigned depth) {
        try {
          return std::make_unique<Queue>(kind, depth);
        } catch (const std::system_error& error) {
          errno = error.code().value();
          PyErr_SetFromErrno(PyExc_OSError);
          throw py::error_already_set();
        }
      }))
      .def("start", &Queue::start)
      .def("wait", &Queue::wait)
      .def("close", &Queue::close);
}

#endif
