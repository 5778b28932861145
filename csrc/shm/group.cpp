// The ranks of one host as a group: collectives and messages through shared memory, in the background where
// asked.
//
// Two lanes: collectives run one after another in the order of the calls, messages all at once. In each lane
// work is done by a thread of its own, if it was started in the background, or by the caller that waits,
// which saves two changes of thread.
#include "shm/reduce.h"

#ifdef PYPAR_BINDING

#  include <condition_variable>
#  include <mutex>

#  include <pybind11/stl.h>

#  include "shm/collectives.h"
#  include "shm/streams.h"

namespace py = pybind11;

namespace pypar::shm {
namespace {

struct Work {
  std::function<void()> run;
  std::shared_ptr<Transfer> transfer;  // of a message
  std::atomic<bool> done{false};
  std::string error;
};

using Deadline = Clock::time_point;
constexpr double kLongest = 1e9;  // seconds that a clock can add

class Group {
 public:
  Group(int fd, int rank, int num_ranks, int64_t buffer_bytes, int64_t stream_bytes, const std::string& name)
      : segment_(fd, rank, Sizes{num_ranks, buffer_bytes, stream_bytes}),
        collectives_(segment_, name, stop_),
        streams_(segment_, name) {}

  ~Group() { shut_down(); }

  // Ends the threads; what they had not finished fails. Memory of tensors is left alone from then on.
  void shut_down() {
    stop_ = true;
    RankLine& line = segment_.line(segment_.rank());
    line.bell.fetch_add(1);
    futex_wake_all(line.bell);
    {
      std::lock_guard<std::mutex> lock(queue_mutex_);
    }
    wake_.notify_all();
    ended_.notify_all();
    std::lock_guard<std::mutex> joining(join_mutex_);
    for (std::thread* thread : {&lane_thread_, &stream_thread_}) {
      if (thread->joinable()) thread->join();
    }
    std::unique_lock<std::mutex> lock(queue_mutex_);
    ended_.wait(lock, [this] { return !is_lane_busy_; });  // a caller may be running one
    for (auto& work : queue_) {
      work->error = "the group was shut down before the collective was done";
      work->run = nullptr;
      work->done.store(true, std::memory_order_release);
    }
    queue_.clear();
  }

  void set_timeout(double seconds) { timeout_s_ = std::min(seconds, kLongest); }

  // In the background: returns at once, for wait(). Otherwise runs it, after what was started before, throws
  // what it throws, and returns nothing.
  std::shared_ptr<Work> submit(std::function<void()> run, bool in_background) {
    auto work = std::make_shared<Work>();
    work->run = std::move(run);
    {
      std::lock_guard<std::mutex> lock(queue_mutex_);
      if (stop_) throw std::runtime_error("the group was shut down");
      queue_.push_back(work);
      if (in_background) {
        if (!lane_thread_.joinable()) lane_thread_ = std::thread([this] { run_lane(); });
        ++background_;
        wake_.notify_all();
        return work;
      }
    }
    py::gil_scoped_release release;
    wait(*work, 0);
    return nullptr;
  }

  std::shared_ptr<Work> message(bool is_send, char* data, int64_t bytes, int peer, int tag) {
    auto work = std::make_shared<Work>();
    work->transfer = std::make_shared<Transfer>();
    work->transfer->data = data;
    work->transfer->bytes = bytes;
    work->transfer->peer = peer;
    work->transfer->tag = tag;
    {
      std::lock_guard<std::mutex> lock(streams_mutex_);
      if (stop_) throw std::runtime_error("the group was shut down");
      is_send ? streams_.send(work->transfer) : streams_.receive(work->transfer);
      streams_.progress();
      if (!stream_thread_.joinable() && !streams_.idle())
        stream_thread_ = std::thread([this] { run_streams(); });
    }
    RankLine& line = segment_.line(segment_.rank());
    line.bell.fetch_add(1, std::memory_order_seq_cst);
    if (line.bell_sleepers.load() != 0) futex_wake_all(line.bell);
    return work;
  }

  bool is_done(Work& work) {
    if (!work.transfer) return work.done.load(std::memory_order_acquire);
    std::lock_guard<std::mutex> lock(streams_mutex_);
    if (!stop_) streams_.progress();
    return work.transfer->done || stop_;
  }

  // Returns when the work is done; throws what it threw.
  void wait(Work& work, double seconds) {
    if (work.transfer) return wait_message(work, seconds);
    const auto deadline = in_seconds(seconds > 0 ? seconds : kLongest);
    std::unique_lock<std::mutex> lock(queue_mutex_);
    while (!work.done.load(std::memory_order_acquire)) {
      if (!is_lane_busy_ && !queue_.empty()) {
        run_next(lock, seconds, check_signals);
        continue;
      }
      if (ended_.wait_for(lock, kNap) == std::cv_status::no_timeout) continue;
      lock.unlock();
      check_signals();
      if (Clock::now() >= deadline)
        collectives_.give_up("Timed out after " + std::to_string(seconds) + " s, which wait() allowed");
      lock.lock();
    }
    if (!work.error.empty()) throw std::runtime_error(work.error);
  }

  // Maps this file, of `part_bytes` for every rank.
  std::shared_ptr<Memory> map(int fd, int64_t part_bytes, int32_t number) {
    return memories_.add(fd, segment_.rank(), segment_.num_ranks(), part_bytes, number);
  }
  Place find(const char* data, int64_t bytes) { return memories_.find(data, bytes); }

  Collectives& collectives() { return collectives_; }
  const Segment& segment() const { return segment_; }

 private:
  static Deadline in_seconds(double seconds) {
    const std::chrono::duration<double> most(std::min(seconds, kLongest));
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(most);
  }

  // Throws Python's exception, if there is one: Ctrl-C, or what a signal's handler raised.
  static void check_signals() {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

  // Runs the first work of the queue. The caller holds queue_mutex_ through `lock`, and the lane is free.
  void run_next(std::unique_lock<std::mutex>& lock, double seconds, void (*poll)()) {
    is_lane_busy_ = true;
    const std::shared_ptr<Work> work = queue_.front();
    queue_.pop_front();
    lock.unlock();
    collectives_.set_timeout(seconds > 0 ? std::min(seconds, kLongest) : timeout_s_);
    collectives_.set_poll(poll);
    std::exception_ptr interrupt;
    try {
      if (!failed_.empty()) throw std::runtime_error("the group cannot be used any more: " + failed_);
      work->run();
    } catch (const py::error_already_set&) {
      interrupt = std::current_exception();
      work->error = collectives_.abandon("interrupted");
    } catch (const std::exception& error) {
      work->error = error.what();
    }
    if (failed_.empty()) failed_ = work->error;
    work->run = nullptr;
    lock.lock();
    is_lane_busy_ = false;
    work->done.store(true, std::memory_order_release);
    ended_.notify_all();
    if (background_ > 0) wake_.notify_all();
    if (interrupt) std::rethrow_exception(interrupt);
  }

  void run_lane() {
    std::unique_lock<std::mutex> lock(queue_mutex_);
    for (;;) {
      wake_.wait(lock,
                 [this] { return stop_.load() || (background_ > 0 && !is_lane_busy_ && !queue_.empty()); });
      if (stop_) return;
      run_next(lock, 0, nullptr);
      if (queue_.empty()) background_ = 0;
    }
  }

  void wait_message(Work& work, double seconds) {
    const double most = seconds > 0 ? seconds : timeout_s_;
    const auto deadline = in_seconds(most);
    auto spin_until = Clock::now() + kSpin;
    for (;;) {
      const uint32_t bell = segment_.line(segment_.rank()).bell.load(std::memory_order_acquire);
      {
        std::lock_guard<std::mutex> lock(streams_mutex_);
        const bool moved = streams_.progress();
        if (work.transfer->done) break;
        if (stop_) throw std::runtime_error("the group was shut down while a message was waited for");
        if (moved) spin_until = Clock::now() + kSpin;
        if (Clock::now() >= deadline) {
          streams_.cancel(work.transfer.get());
          streams_.give_up(*work.transfer, "message with", work.transfer->peer,
                           "Timed out after " + std::to_string(most) + " s");
          break;
        }
      }
      if (Clock::now() < spin_until) {
        for (int i = 0; i < 16; ++i) relax();
        sched_yield();
      } else if (!nap(bell)) {
        check_signals();
        std::lock_guard<std::mutex> lock(streams_mutex_);
        streams_.look_after();
      }
    }
    if (!work.transfer->error.empty()) throw std::runtime_error(work.transfer->error);
  }

  // Sleeps until the bell rings. False if it did not.
  bool nap(uint32_t seen) {
    RankLine& line = segment_.line(segment_.rank());
    line.bell_sleepers.fetch_add(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (line.bell.load(std::memory_order_acquire) == seen) futex_wait(line.bell, seen, kNap);
    line.bell_sleepers.fetch_sub(1, std::memory_order_relaxed);
    return line.bell.load(std::memory_order_acquire) != seen;
  }

  // Moves messages that nobody waits for.
  void run_streams() {
    while (!stop_) {
      const uint32_t bell = segment_.line(segment_.rank()).bell.load(std::memory_order_acquire);
      {
        std::lock_guard<std::mutex> lock(streams_mutex_);
        if (streams_.progress()) continue;
      }
      if (!nap(bell)) {
        std::lock_guard<std::mutex> lock(streams_mutex_);
        streams_.look_after();
      }
    }
  }

  std::atomic<bool> stop_{false};
  Segment segment_;
  Collectives collectives_;
  Streams streams_;
  Memories memories_;
  double timeout_s_ = 1800;
  std::mutex queue_mutex_;  // guards queue_, background_, is_lane_busy_
  std::condition_variable wake_, ended_;
  bool is_lane_busy_ = false;  // somebody runs a collective
  std::deque<std::shared_ptr<Work>> queue_;
  int64_t background_ = 0;
  std::string failed_;
  std::mutex streams_mutex_;
  std::mutex join_mutex_;
  std::thread lane_thread_, stream_thread_;
};

std::vector<Part> parts_of(const std::vector<std::pair<uintptr_t, int64_t>>& addresses) {
  std::vector<Part> parts;
  for (const auto& [address, bytes] : addresses) parts.push_back({reinterpret_cast<char*>(address), bytes});
  return parts;
}

using Address = std::pair<uintptr_t, int64_t>;

std::vector<Pieces> all_pieces(const std::vector<std::vector<Address>>& addresses) {
  std::vector<Pieces> pieces;
  for (const auto& each : addresses) pieces.emplace_back(parts_of(each));
  return pieces;
}

void check_rank(const Group& group, int rank, const char* what) {
  if (rank < 0 || rank >= group.segment().num_ranks()) {
    throw py::value_error(std::string(what) + " (" + std::to_string(rank) +
                          ") must be a rank of the group, 0 to " +
                          std::to_string(group.segment().num_ranks() - 1));
  }
}

void check_parts(const Group& group, const std::vector<Address>& parts) {
  if (static_cast<int>(parts.size()) != group.segment().num_ranks()) {
    throw py::value_error("one tensor per rank is needed, " + std::to_string(parts.size()) + " were given");
  }
  for (const Address& part : parts) {
    if (part.second < 0) throw py::value_error("a size in bytes must not be negative");
  }
}

void check_pieces(const Group& group, const std::vector<std::vector<Address>>& pieces) {
  if (static_cast<int>(pieces.size()) != group.segment().num_ranks()) {
    throw py::value_error("pieces of every rank are needed, of " + std::to_string(pieces.size()) +
                          " they were given");
  }
  for (const auto& each : pieces) {
    for (const Address& piece : each) {
      if (piece.second < 0) throw py::value_error("a size in bytes must not be negative");
    }
  }
}

void check_reduction(int64_t count, int type, int op) {
  if (count < 0 || type < 0 || type >= kShmBytes || op < 0 || op >= kNumShmOps) {
    throw py::value_error("unknown type or operation of a reduction");
  }
}

char* memory_at(uintptr_t address) { return reinterpret_cast<char*>(address); }

}  // namespace
}  // namespace pypar::shm

PYPAR_BIND(shm) {
  using namespace pypar::shm;  // NOLINT
  using Self = std::shared_ptr<Group>;
  py::class_<Work, std::shared_ptr<Work>>(module, "ShmWork")
      .def_property_readonly("peer",
                             [](const Work& work) { return work.transfer ? work.transfer->peer : -1; });
  py::class_<Memory, std::shared_ptr<Memory>>(module, "ShmMemory", py::buffer_protocol())
      .def_buffer([](Memory& memory) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(memory.mine()), memory.part_bytes());
      });
  py::class_<Group, Self> group(module, "ShmGroup");
  group.def(py::init<int, int, int, int64_t, int64_t, const std::string&>(), py::arg("fd"), py::arg("rank"),
            py::arg("num_ranks"), py::arg("buffer_bytes"), py::arg("stream_bytes"), py::arg("name"));
  group.def_property_readonly("num_in_place", [](Group& g) { return g.collectives().num_in_place(); });
  group.def("map", &Group::map, py::arg("fd"), py::arg("part_bytes"), py::arg("number"));
  group.def("set_timeout", &Group::set_timeout);
  group.def("wait", &Group::wait, py::arg("work"), py::arg("seconds") = 0.0,
            py::call_guard<py::gil_scoped_release>());
  group.def("shut_down", &Group::shut_down, py::call_guard<py::gil_scoped_release>());
  group.def("is_done", &Group::is_done, py::call_guard<py::gil_scoped_release>());
  group.def("all_reduce", [](Group& g, uintptr_t data, int64_t count, int type, int op, bool background) {
    check_reduction(count, type, op);
    const Place place = g.find(memory_at(data), count * pypar::kShmTypeBytes[type]);
    return g.submit([&g, data, count, type, op,
                     place] { g.collectives().all_reduce(memory_at(data), count, type, op, place); },
                    background);
  });
  group.def("reduce",
            [](Group& g, uintptr_t data, int64_t count, int type, int op, int root, bool background) {
              check_reduction(count, type, op);
              check_rank(g, root, "dst");
              return g.submit([&g, data, count, type, op,
                               root] { g.collectives().reduce(memory_at(data), count, type, op, root); },
                              background);
            });
  group.def("broadcast", [](Group& g, const Address& data, int type, int root, bool background) {
    check_rank(g, root, "src");
    return g.submit(
        [&g, data, type, root] { g.collectives().broadcast(memory_at(data.first), data.second, type, root); },
        background);
  });
  group.def("all_gather",
            [](Group& g, const Address& source, const std::vector<Address>& outs, int type, bool background) {
              check_parts(g, outs);
              return g.submit(
                  [&g, source, outs = parts_of(outs), type] {
                    g.collectives().all_gather({memory_at(source.first), source.second}, outs, type);
                  },
                  background);
            });
  group.def("gather_pieces", [](Group& g, const std::vector<Address>& source,
                                const std::vector<std::vector<Address>>& outs, int type, bool background) {
    check_pieces(g, outs);
    const Place place = source.size() == 1 ? g.find(memory_at(source[0].first), source[0].second) : Place{};
    return g.submit([&g, source = Pieces(parts_of(source)), outs = all_pieces(outs), type,
                     place] { g.collectives().gather_pieces(source, outs, type, place); },
                    background);
  });
  group.def("gather", [](Group& g, const Address& source, const std::vector<Address>& outs, int type,
                         int root, bool background) {
    check_rank(g, root, "dst");
    if (root == g.segment().rank()) check_parts(g, outs);
    return g.submit(
        [&g, source, outs = parts_of(outs), type, root] {
          g.collectives().gather({memory_at(source.first), source.second}, outs, type, root);
        },
        background);
  });
  group.def("scatter", [](Group& g, const std::vector<Address>& ins, const Address& out, int type, int root,
                          bool background) {
    check_rank(g, root, "src");
    if (root == g.segment().rank()) {
      check_parts(g, ins);
      for (const Address& in : ins) {
        if (in.second != out.second) throw py::value_error("scatter needs tensors of one size");
      }
    }
    return g.submit([&g, ins = parts_of(ins), out, type,
                     root] { g.collectives().scatter(ins, {memory_at(out.first), out.second}, type, root); },
                    background);
  });
  group.def("reduce_scatter",
            [](Group& g, const std::vector<Address>& ins, uintptr_t out, int type, int op, bool background) {
              check_reduction(0, type, op);
              check_parts(g, ins);
              return g.submit([&g, ins = parts_of(ins), out, type,
                               op] { g.collectives().reduce_scatter(ins, memory_at(out), type, op); },
                              background);
            });
  group.def("reduce_pieces", [](Group& g, const std::vector<std::vector<Address>>& ins,
                                const std::vector<Address>& out, int type, int op, bool background) {
    check_reduction(0, type, op);
    check_pieces(g, ins);
    return g.submit([&g, ins = all_pieces(ins), out = Pieces(parts_of(out)), type,
                     op] { g.collectives().reduce_pieces(ins, out, type, op); },
                    background);
  });
  group.def("all_to_all", [](Group& g, const std::vector<Address>& ins, const std::vector<Address>& outs,
                             int type, bool background) {
    check_parts(g, ins);
    check_parts(g, outs);
    return g.submit([&g, ins = parts_of(ins), outs = parts_of(outs),
                     type] { g.collectives().all_to_all(ins, outs, type); },
                    background);
  });
  group.def("barrier", [](Group& g, bool background) {
    return g.submit([&g] { g.collectives().barrier(); }, background);
  });
  group.def("send", [](Group& g, const Address& data, int peer, int tag) {
    check_rank(g, peer, "dst");
    return g.message(true, memory_at(data.first), data.second, peer, tag);
  });
  group.def("receive", [](Group& g, const Address& data, int peer, int tag) {
    if (peer != -1) check_rank(g, peer, "src");
    return g.message(false, memory_at(data.first), data.second, peer, tag);
  });
  group.def_static("segment_bytes", [](int num_ranks, int64_t buffer_bytes, int64_t stream_bytes) {
    return Sizes{num_ranks, buffer_bytes, stream_bytes}.total();
  });
}

#endif
