// The collectives of one group of ranks, in steps over a Segment (segment.h). Every rank calls the same
// ones in the same order, one at a time.
#pragma once

#include <algorithm>
#include <functional>
#include <mutex>
#include <vector>

#include "shm/describe.h"
#include "shm/memory.h"
#include "shm/pieces.h"
#include "shm/reduce.h"
#include "shm/segment.h"

namespace pypar::shm {

class Collectives {
 public:
  Collectives(Segment& segment, std::string group, const std::atomic<bool>& stop)
      : segment_(segment),
        group_(std::move(group)),
        stop_(stop),
        rank_(segment.rank()),
        size_(segment.num_ranks()) {}

  // What to call now and then while waiting; may throw.
  void set_poll(void (*poll)()) { poll_ = poll; }
  void set_timeout(double seconds) { timeout_s_ = seconds; }

  // Calls that copied nothing.
  int64_t num_in_place() const { return num_in_place_.load(std::memory_order_relaxed); }

  // From any thread: whoever waits in a collective gives it up, for this reason.
  void give_up(const std::string& why) {
    std::lock_guard<std::mutex> lock(reason_mutex_);
    if (reason_.empty()) reason_ = why;
    gives_up_.store(true, std::memory_order_release);
  }

  // data: in and out. Where it lies at one place of shared memory on all ranks, nothing is copied.
  void all_reduce(char* data, int64_t count, int type, int op, const Place& place) {
    const int64_t bytes = count * kShmTypeBytes[type];
    // One shot: everyone reads everything, one step a chunk. Two shots: everyone reduces its share, then
    // collects the others'; two steps, but less traffic.
    const bool two_shots = bytes > kOneShotBytes;
    const bool is_placed = two_shots && place.memory;
    begin({kAllReduce, op, type, -1, bytes, place.offset, is_placed ? place.memory->number() : 0});
    if (is_placed) {
      leave(enter());
      if (all_in_place()) return all_reduce_in_place(place, bytes, type, op);
    }
    const int64_t chunk = segment_.sizes().buffer_bytes;
    for (int64_t at = 0; at < bytes || is_first_;) {
      const int64_t size = std::min(chunk, bytes - at);
      const bool done = two_shots ? all_reduce_two_shots(data + at, size, type, op)
                                  : all_reduce_one_shot(data + at, size, type, op);
      if (done) at += chunk;
    }
  }

  // The root's data receives the result; the others' stays.
  void reduce(char* data, int64_t count, int type, int op, int root) {
    const int64_t bytes = count * kShmTypeBytes[type];
    begin({kReduce, op, type, root, bytes});
    for_chunks(bytes, segment_.sizes().buffer_bytes, [&](int64_t at, int64_t size) {
      const uint32_t step = enter();
      if (rank_ != root) std::memcpy(mine(step), data + at, static_cast<size_t>(size));
      leave(step);
      if (rank_ == root) combine(step, 0, data + at, data + at, nullptr, size, type, op);
    });
  }

  void broadcast(char* data, int64_t bytes, int type, int root) {
    begin({kBroadcast, 0, type, root, bytes});
    for_chunks(bytes, segment_.sizes().buffer_bytes, [&](int64_t at, int64_t size) {
      const uint32_t step = enter();
      if (rank_ == root) std::memcpy(mine(step), data + at, static_cast<size_t>(size));
      leave(step);
      if (rank_ != root) std::memcpy(data + at, theirs(root, step), static_cast<size_t>(size));
    });
  }

  // outs[r] receives rank r's source.
  void all_gather(const Part& source, const std::vector<Part>& outs, int type) {
    begin({kAllGather, 0, type, -1, source.bytes});
    gather_steps(source, outs);
  }

  // outs[r] receives rank r's source. Where all sources lie at one place of shared memory, everyone reads
  // them there; a source may be written again when this has returned.
  void gather_pieces(const Pieces& source, const std::vector<Pieces>& outs, int type, const Place& place) {
    begin({kAllGather, 0, type, -1, source.bytes(), place.offset, place.memory ? place.memory->number() : 0});
    leave(enter());
    int64_t most = 0;
    for (int r = 0; r < size_; ++r) {
      check_room(r, outs[r].bytes());
      most = std::max(most, outs[r].bytes());
    }
    outs[rank_].take(source);
    if (any_in_place() && all_in_place()) {
      for (int r = 0; r < size_; ++r) {
        if (r != rank_) outs[r].write(0, outs[r].bytes(), place.memory->part(r) + place.offset);
      }
      const uint32_t step = enter();
      leave(step);
      for (int r = 0; r < size_; ++r) await_step(r, step);
      num_in_place_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    for_chunks(most, segment_.sizes().buffer_bytes, [&](int64_t at, int64_t size) {
      const uint32_t step = enter();
      source.read(at, std::min(size, source.bytes() - at), mine(step));
      leave(step);
      for (int r = 0; r < size_; ++r) {
        if (r != rank_) outs[r].write(at, std::min(size, outs[r].bytes() - at), theirs(r, step));
      }
    });
  }

  // The root's outs[r] receives rank r's source; the others' outs are empty.
  void gather(const Part& source, const std::vector<Part>& outs, int type, int root) {
    begin({kGather, 0, type, root, source.bytes});
    gather_steps(source, outs);
  }

  // out receives the root's ins[this rank].
  void scatter(const std::vector<Part>& ins, const Part& out, int type, int root) {
    begin({kScatter, 0, type, root, out.bytes});
    const int64_t piece = piece_bytes();
    for_chunks(out.bytes, piece, [&](int64_t at, int64_t size) {
      const uint32_t step = enter();
      if (rank_ == root) {
        for (int r = 0; r < size_; ++r) {
          if (r != rank_) std::memcpy(mine(step) + r * piece, ins[r].data + at, static_cast<size_t>(size));
        }
      }
      leave(step);
      const char* from = rank_ == root ? ins[rank_].data + at : theirs(root, step) + rank_ * piece;
      if (from != out.data + at) std::memmove(out.data + at, from, static_cast<size_t>(size));
    });
  }

  // out receives the reduction of every rank's ins[this rank]. ins[r] has the same size on all ranks.
  void reduce_scatter(const std::vector<Part>& ins, char* out, int type, int op) {
    int64_t total = 0, most = 0;
    for (const Part& in : ins) {
      total += in.bytes;
      most = std::max(most, in.bytes);
    }
    begin({kReduceScatter, op, type, -1, total});
    const int64_t piece = piece_bytes();
    for_chunks(most, piece, [&](int64_t at, int64_t size) {
      const uint32_t step = enter();
      for (int r = 0; r < size_; ++r) {
        const int64_t count = std::min(size, ins[r].bytes - at);
        if (r != rank_ && count > 0)
          std::memcpy(mine(step) + r * piece, ins[r].data + at, static_cast<size_t>(count));
      }
      leave(step);
      const int64_t count = std::min(size, ins[rank_].bytes - at);
      if (count > 0) combine(step, rank_ * piece, ins[rank_].data + at, out + at, nullptr, count, type, op);
    });
  }

  // The same over pieces, each of whole elements; out has those of ins[this rank], and may be them.
  void reduce_pieces(const std::vector<Pieces>& ins, const Pieces& out, int type, int op) {
    int64_t total = 0, most = 0;
    for (const Pieces& in : ins) {
      total += in.bytes();
      most = std::max(most, in.bytes());
    }
    begin({kReduceScatter, op, type, -1, total});
    const int64_t piece = piece_bytes();
    for_chunks(most, piece, [&](int64_t at, int64_t size) {
      const uint32_t step = enter();
      char* const buffer = mine(step) + rank_ * piece;  // nobody else reads it
      for (int r = 0; r < size_; ++r) {
        if (r != rank_) ins[r].read(at, std::min(size, ins[r].bytes() - at), mine(step) + r * piece);
      }
      leave(step);
      const int64_t count = std::min(size, ins[rank_].bytes() - at);
      if (count <= 0) return;
      const char* own = ins[rank_].at(at, count);
      if (own == nullptr) ins[rank_].read(at, count, buffer);
      char* const to = out.at(at, count);
      combine(step, rank_ * piece, own != nullptr ? own : buffer, to != nullptr ? to : buffer, nullptr, count,
              type, op);
      if (to == nullptr) out.write(at, count, buffer);
    });
  }

  // outs[r] receives rank r's ins[this rank]. A first step tells everyone the sizes.
  void all_to_all(const std::vector<Part>& ins, const std::vector<Part>& outs, int type) {
    int64_t most = 0;
    for (const Part& in : ins) most = std::max(most, in.bytes);
    begin({kAllToAll, 0, type, -1, most});
    uint32_t step = enter();
    auto* sizes = reinterpret_cast<int64_t*>(mine(step));
    for (int r = 0; r < size_; ++r) sizes[r] = ins[r].bytes;
    leave(step);
    for (int r = 0; r < size_; ++r) {
      most = std::max(most, described_[r].bytes);
      const int64_t coming =
          r == rank_ ? ins[r].bytes : reinterpret_cast<const int64_t*>(theirs(r, step))[rank_];
      if (coming != outs[r].bytes) {
        fail("rank " + std::to_string(r) + " sends " + std::to_string(coming) + " bytes, and room for " +
             std::to_string(outs[r].bytes) + " was given; the split sizes of the two ranks must agree");
      }
    }
    copy_own(ins[rank_], outs[rank_]);
    const int64_t piece = piece_bytes();
    for_chunks(most, piece, [&](int64_t at, int64_t) {
      const uint32_t now = enter();
      for (int r = 0; r < size_; ++r) {
        if (r != rank_) copy_piece(mine(now) + r * piece, ins[r].data + at, ins[r].bytes - at, piece);
      }
      leave(now);
      for (int r = 0; r < size_; ++r) {
        if (r != rank_)
          copy_piece(outs[r].data + at, theirs(r, now) + rank_ * piece, outs[r].bytes - at, piece);
      }
    });
  }

  void barrier() {
    begin({kBarrier, 0, kShmBytes, -1, 0});
    leave(enter());
  }

  // Throws a sentence that says where it happened; the other ranks give up too.
  [[noreturn]] void fail(const std::string& what) { throw std::runtime_error(abandon(what)); }

  // Makes the other ranks give up. The sentence for this one.
  std::string abandon(const std::string& why) {
    uint32_t none = 0;
    segment_.header().failed.compare_exchange_strong(none, static_cast<uint32_t>(rank_) + 1);
    return where() + ": " + why;
  }

  std::string where() const {
    return std::string(call_.kind < kNumKinds ? kKindNames[call_.kind] : "?") + " number " +
           std::to_string(number_) + " of group " + group_ + " (rank " + std::to_string(rank_) + " of " +
           std::to_string(size_) + ")";
  }

 private:
  // Above this size two shots cost less traffic than they cost waiting.
  static constexpr int64_t kOneShotBytes = 256 << 10;
  // What is copied on to further ranks while it is in the nearest cache.
  static constexpr int64_t kBlockBytes = 16 << 10;

  void begin(const Description& call) {
    call_ = call;
    ++number_;
    is_first_ = true;
    deadline_ =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s_));
  }

  // The next step's number, once this rank may write its buffer.
  uint32_t enter() {
    const uint32_t step = step_ + 1;
    for (int r = 0; r < size_; ++r) await_step(r, step - 1);
    step_ = step;
    if (is_first_) segment_.line(rank_).description[step % 2] = call_;
    return step;
  }

  // Shows this rank's buffer. In a call's first step, also waits for all others and compares what they call.
  void leave(uint32_t step) {
    RankLine& line = segment_.line(rank_);
    publish(line.step, step, line.sleepers);
    if (!is_first_) return;
    is_first_ = false;
    described_.resize(static_cast<size_t>(size_));
    for (int r = 0; r < size_; ++r) {
      await_step(r, step);
      described_[r] = segment_.line(r).description[step % 2];
      check_same(r, described_[r]);
    }
  }

  char* mine(uint32_t step) const { return segment_.buffer(rank_, step); }

  const char* theirs(int rank, uint32_t step) {
    await_step(rank, step);
    return segment_.buffer(rank, step);
  }

  void await_step(int rank, uint32_t step) {
    if (rank == rank_) return;
    RankLine& line = segment_.line(rank);
    await(
        line.step, line.sleepers, [step](uint32_t flag) { return reached(flag, step); },
        [&] { look_after(step); });
  }

  void look_after(uint32_t step) {
    if (stop_.load(std::memory_order_relaxed))
      throw std::runtime_error(where() + ": the group was shut down");
    if (poll_ != nullptr) poll_();
    if (gives_up_.load(std::memory_order_acquire)) {
      std::lock_guard<std::mutex> lock(reason_mutex_);
      fail(reason_);
    }
    const uint32_t failed = segment_.header().failed.load();
    if (failed != 0) {
      throw std::runtime_error(where() + ": rank " + std::to_string(failed - 1) +
                               " gave up first; its error says why, and the group cannot be used any more");
    }
    std::string ended, missing;
    for (int r = 0; r < size_; ++r) {
      const bool alive = segment_.is_alive(r);  // before the flag: it may have died after it set that
      if (r == rank_ || reached(segment_.line(r).step.load(std::memory_order_acquire), step)) continue;
      missing += (missing.empty() ? "" : ", ") + std::to_string(r);
      if (!alive) ended += (ended.empty() ? "" : ", ") + std::to_string(r);
    }
    if (!ended.empty()) fail("the process of rank " + ended + " has ended");
    if (Clock::now() < deadline_ || missing.empty()) return;
    fail("Timed out after " + std::to_string(timeout_s_) + " s; these ranks did not come: " + missing);
  }

  void check_same(int rank, const Description& other) {
    const bool sizes_may_differ =
        call_.kind == kAllToAll || call_.kind == kAllGather || call_.kind == kGather;
    if (other.kind == call_.kind && other.op == call_.op && other.dtype == call_.dtype &&
        other.root == call_.root && (sizes_may_differ || other.bytes == call_.bytes)) {
      return;
    }
    fail("rank " + std::to_string(rank_) + " calls " + describe(call_) + ", but rank " +
         std::to_string(rank) + " calls " + describe(other) +
         "; all ranks must make the same calls in the same order");
  }

  template <class Body>
  void for_chunks(int64_t bytes, int64_t chunk, const Body& body) {
    for (int64_t at = 0; at < bytes || is_first_; at += chunk) body(at, std::min(chunk, bytes - at));
  }

  int64_t piece_bytes() const { return segment_.sizes().buffer_bytes / size_ / 64 * 64; }

  static void copy_piece(char* to, const char* from, int64_t left, int64_t piece) {
    if (left > 0) std::memcpy(to, from, static_cast<size_t>(std::min(left, piece)));
  }

  static void copy_own(const Part& from, const Part& to) {
    if (from.data != to.data && from.bytes > 0)
      std::memmove(to.data, from.data, static_cast<size_t>(from.bytes));
  }

  // out = the reduction, neighbours first, of this rank's `own` and what the others wrote at `offset` of
  // their buffers.
  void combine(uint32_t step, int64_t offset, const char* own, char* out, char* copy, int64_t bytes, int type,
               int op) {
    inputs_.resize(static_cast<size_t>(size_));
    for (int r = 0; r < size_; ++r) inputs_[r] = r == rank_ ? own : theirs(r, step) + offset;
    reduce_inputs(out, copy, bytes, type, op);
  }

  void reduce_inputs(char* out, char* copy, int64_t bytes, int type, int op) {
    const ShmReduce arguments{inputs_.data(), size_, out, copy, bytes / kShmTypeBytes[type], type, op};
    for (int isa = selected_isa(); isa >= 0; --isa) {
      if (auto* kernel = shm_reduce_kernels::of(isa)) return kernel(arguments);
    }
    fail("this build has no reduction kernel");
  }

  bool all_reduce_one_shot(char* data, int64_t bytes, int type, int op) {
    const uint32_t step = enter();
    if (bytes > 0) std::memcpy(mine(step), data, static_cast<size_t>(bytes));
    leave(step);
    if (bytes > 0) combine(step, 0, data, data, nullptr, bytes, type, op);
    return true;
  }

  // False, and nothing done, where some other rank brought no data to the call's first step: its tensor is in
  // shared memory.
  bool all_reduce_two_shots(char* data, int64_t bytes, int type, int op) {
    const bool first = is_first_;
    const int64_t piece = (bytes + size_ * 64 - 1) / (size_ * 64) * 64;
    const auto begin_of = [&](int r) { return std::min(bytes, r * piece); };
    const auto bytes_of = [&](int r) { return begin_of(r + 1) - begin_of(r); };
    uint32_t step = enter();
    for (int r = 0; r < size_; ++r) {
      if (r != rank_ && bytes_of(r) > 0) {
        std::memcpy(mine(step) + begin_of(r), data + begin_of(r), static_cast<size_t>(bytes_of(r)));
      }
    }
    leave(step);
    if (first && any_in_place()) return false;
    const uint32_t next = step + 1;
    // All others are seen at `step` below, which is what entering the next step asks for.
    char* const share = data + begin_of(rank_);
    combine(step, begin_of(rank_), share, share, segment_.buffer(rank_, next), bytes_of(rank_), type, op);
    leave(enter());
    for (int r = 0; r < size_; ++r) {
      if (r == rank_ || bytes_of(r) == 0) continue;
      std::memcpy(data + begin_of(r), theirs(r, next), static_cast<size_t>(bytes_of(r)));
    }
    return true;
  }

  // Whether the ranks' tensors lie in shared memory, by what all said in the call's first step: all ranks
  // find the same.
  bool any_in_place() const {
    return std::any_of(described_.begin(), described_.end(), [](const auto& d) { return d.memory != 0; });
  }
  bool all_in_place() const {
    const Description& own = described_[static_cast<size_t>(rank_)];
    return std::all_of(described_.begin(), described_.end(),
                       [&](const auto& d) { return d.memory == own.memory && d.offset == own.offset; });
  }

  // Everyone has come, so all may be read; nobody reads or writes another's share. Everyone reduces its share
  // and writes it to all. The second step says that this rank has done so.
  void all_reduce_in_place(const Place& place, int64_t bytes, int type, int op) {
    const int64_t piece = (bytes + size_ * 64 - 1) / (size_ * 64) * 64;
    const int64_t end = std::min(bytes, (rank_ + 1) * piece);
    const int other = rank_ == 0 ? 1 : 0;
    inputs_.resize(static_cast<size_t>(size_));
    for (int64_t at = std::min(bytes, rank_ * piece); at < end; at += kBlockBytes) {
      const int64_t size = std::min(kBlockBytes, end - at);
      const auto part = [&](int r) { return place.memory->part(r) + place.offset + at; };
      for (int r = 0; r < size_; ++r) inputs_[r] = part(r);
      reduce_inputs(part(rank_), size_ > 1 ? part(other) : nullptr, size, type, op);
      for (int r = other + 1; r < size_; ++r) {
        if (r != rank_) std::memcpy(part(r), part(rank_), static_cast<size_t>(size));
      }
    }
    const uint32_t step = enter();
    leave(step);
    for (int r = 0; r < size_; ++r) await_step(r, step);
    num_in_place_.fetch_add(1, std::memory_order_relaxed);
  }

  void gather_steps(const Part& source, const std::vector<Part>& outs) {
    const int64_t chunk = segment_.sizes().buffer_bytes;
    if (!outs.empty()) copy_own(source, outs[rank_]);
    int64_t most = source.bytes;
    for (int64_t at = 0; at < most || is_first_; at += chunk) {
      const bool first = is_first_;
      const uint32_t step = enter();
      copy_piece(mine(step), source.data + at, source.bytes - at, chunk);
      leave(step);
      if (first) most = check_gathered(outs);
      for (int r = 0; r < size_ && !outs.empty(); ++r) {
        if (r != rank_) copy_piece(outs[r].data + at, theirs(r, step), outs[r].bytes - at, chunk);
      }
    }
  }

  // The largest contribution; what the ranks bring must be what this rank has room for.
  int64_t check_gathered(const std::vector<Part>& outs) {
    int64_t most = 0;
    for (int r = 0; r < size_; ++r) {
      most = std::max(most, described_[r].bytes);
      if (!outs.empty()) check_room(r, outs[r].bytes);
    }
    return most;
  }

  void check_room(int rank, int64_t bytes) {
    if (described_[rank].bytes == bytes) return;
    fail("rank " + std::to_string(rank) + " brings " + std::to_string(described_[rank].bytes) +
         " bytes, and room for " + std::to_string(bytes) + " was given");
  }

  Segment& segment_;
  std::string group_;
  const std::atomic<bool>& stop_;
  std::atomic<bool> gives_up_{false};
  std::mutex reason_mutex_;
  std::string reason_;
  void (*poll_)() = nullptr;
  int rank_, size_;
  double timeout_s_ = 1800;
  uint32_t step_ = 0;
  uint64_t number_ = 0;
  std::atomic<int64_t> num_in_place_{0};
  bool is_first_ = false;
  Description call_{};
  Clock::time_point deadline_;
  std::vector<Description> described_;
  std::vector<const void*> inputs_;
};

}  // namespace pypar::shm
