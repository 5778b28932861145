// Messages from rank to rank of one group, over the byte streams of a Segment.
//
// Sends and receives make progress together, whoever waits: a rank that sends and receives at once cannot be
// stuck. Messages between two ranks arrive in order; a receive takes the first one with its tag. A message
// that nobody has asked for yet is kept aside when it stands before one that is wanted.
#pragma once

#include <algorithm>
#include <deque>
#include <list>
#include <memory>
#include <vector>

#include "shm/segment.h"

namespace pypar::shm {

struct Transfer {
  char* data;
  int64_t bytes;
  int peer;  // -1: receive from anyone
  int tag;
  bool done = false;
  int64_t moved = 0;        // sends: of header and data
  std::vector<char> owned;  // what is left to send of a message that its sender gave up
  std::string error;
};

class Streams {
 public:
  Streams(Segment& segment, std::string group)
      : segment_(segment), group_(std::move(group)), rank_(segment.rank()) {
    for (int r = 0; r < segment.num_ranks(); ++r) arriving_.emplace_back();
    sends_.resize(static_cast<size_t>(segment.num_ranks()));
  }

  void send(std::shared_ptr<Transfer> transfer) {
    sends_[static_cast<size_t>(transfer->peer)].push_back(std::move(transfer));
  }
  void receive(std::shared_ptr<Transfer> transfer) { receives_.push_back(std::move(transfer)); }

  bool idle() const {
    return receives_.empty() &&
           std::all_of(sends_.begin(), sends_.end(), [](const auto& queue) { return queue.empty(); });
  }

  // Moves what can be moved now. True if anything moved.
  bool progress() {
    bool moved = false;
    for (int r = 0; r < segment_.num_ranks(); ++r) moved |= push(r);
    match_kept();
    for (int r = 0; r < segment_.num_ranks(); ++r) moved |= pull(r);
    return moved;
  }

  // Gives up what waits for ranks that have ended.
  void look_after() {
    for (int r = 0; r < segment_.num_ranks(); ++r) {
      if (r == rank_ || segment_.is_alive(r)) continue;
      pull(r);  // what it had sent before
      const std::string why = "the process of rank " + std::to_string(r) + " has ended";
      for (auto& transfer : sends_[static_cast<size_t>(r)]) give_up(*transfer, "send to", r, why);
      sends_[static_cast<size_t>(r)].clear();
      Arriving& a = arriving_[static_cast<size_t>(r)];
      if (a.target) give_up(*a.target, "receive from", r, why + " in the middle of the message");
      a.target.reset();
      a.has_ended = true;
      receives_.remove_if([&](auto& transfer) {
        if (transfer->peer != r) return false;
        give_up(*transfer, "receive from", r, why);
        return true;
      });
    }
  }

  // Leaves the memory of a transfer alone from now on. What has begun is brought to its end elsewhere.
  void cancel(const Transfer* transfer) {
    receives_.remove_if([&](auto& one) { return one.get() == transfer; });
    for (Arriving& a : arriving_) {
      if (a.target.get() != transfer) continue;
      a.target.reset();
      a.aside.reset(new Kept{a.envelope, std::vector<char>(static_cast<size_t>(a.envelope.bytes))});
      a.is_cancelled = true;
    }
    for (auto& queue : sends_) {
      for (auto it = queue.begin(); it != queue.end(); ++it) {
        Transfer& one = **it;
        if (&one != transfer) continue;
        if (one.moved == 0) {
          queue.erase(it);
        } else {
          one.owned.assign(one.data, one.data + one.bytes);
          one.data = one.owned.data();
        }
        break;
      }
    }
  }

  void give_up(Transfer& transfer, const char* what, int rank, const std::string& why) const {
    transfer.error = std::string(what) + (rank < 0 ? " any rank" : " rank " + std::to_string(rank)) +
                     " (tag " + std::to_string(transfer.tag) + ", " + std::to_string(transfer.bytes) +
                     " bytes) in group " + group_ + " (rank " + std::to_string(rank_) + " of " +
                     std::to_string(segment_.num_ranks()) + "): " + why;
    transfer.done = true;
  }

 private:
  struct Envelope {
    int64_t bytes;
    int64_t tag;
  };
  struct Kept {
    Envelope envelope;
    std::vector<char> data;
  };
  // What comes from one rank: the message that is being read, and those kept aside.
  struct Arriving {
    Envelope envelope{};
    int64_t header_read = 0;
    int64_t data_read = 0;
    std::shared_ptr<Transfer> target;  // or, if none, `aside`
    std::unique_ptr<Kept> aside;
    bool has_ended = false;     // nothing more will come
    bool is_cancelled = false;  // `aside` is nobody's
    std::deque<std::unique_ptr<Kept>> kept;
  };

  void ring(int rank) {
    RankLine& line = segment_.line(rank);
    line.bell.fetch_add(1, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (line.bell_sleepers.load(std::memory_order_relaxed) != 0) futex_wake_all(line.bell);
  }

  bool push(int to) {
    auto& queue = sends_[static_cast<size_t>(to)];
    if (queue.empty()) return false;
    Stream& stream = segment_.stream(rank_, to);
    char* const data = segment_.stream_data(rank_, to);
    const int64_t size = segment_.sizes().stream_bytes;
    bool moved = false;
    while (!queue.empty()) {
      Transfer& transfer = *queue.front();
      const Envelope envelope{transfer.bytes, transfer.tag};
      const int64_t total = int64_t{sizeof(Envelope)} + transfer.bytes;
      const uint32_t written = stream.written.load(std::memory_order_relaxed);
      const uint32_t read = stream.read.load(std::memory_order_acquire);
      int64_t room = size - static_cast<int64_t>(written - read);
      uint32_t at = written;
      while (room > 0 && transfer.moved < total) {
        const bool in_header = transfer.moved < int64_t{sizeof(Envelope)};
        const char* from = in_header ? reinterpret_cast<const char*>(&envelope) + transfer.moved
                                     : transfer.data + (transfer.moved - int64_t{sizeof(Envelope)});
        const int64_t left = (in_header ? int64_t{sizeof(Envelope)} : total) - transfer.moved;
        const int64_t place = at & static_cast<uint32_t>(size - 1);
        const int64_t count = std::min({left, room, size - place});
        std::memcpy(data + place, from, static_cast<size_t>(count));
        transfer.moved += count;
        at += static_cast<uint32_t>(count);
        room -= count;
      }
      if (at != written) {
        stream.written.store(at, std::memory_order_release);
        moved = true;
      }
      if (transfer.moved < total) break;
      transfer.done = true;
      queue.pop_front();
    }
    if (moved) ring(to);
    return moved;
  }

  // Reads up to `count` bytes of what `from` has sent.
  int64_t take(int from, char* to, int64_t count) {
    Stream& stream = segment_.stream(from, rank_);
    const char* const data = segment_.stream_data(from, rank_);
    const int64_t size = segment_.sizes().stream_bytes;
    const uint32_t read = stream.read.load(std::memory_order_relaxed);
    const uint32_t written = stream.written.load(std::memory_order_acquire);
    const int64_t place = read & static_cast<uint32_t>(size - 1);
    const int64_t available = std::min({count, static_cast<int64_t>(written - read), size - place});
    if (available <= 0) return 0;
    std::memcpy(to, data + place, static_cast<size_t>(available));
    stream.read.store(read + static_cast<uint32_t>(available), std::memory_order_release);
    return available;
  }

  bool pull(int from) {
    Arriving& a = arriving_[static_cast<size_t>(from)];
    if (a.has_ended) return false;
    bool moved = false;
    for (;;) {
      if (a.header_read < int64_t{sizeof(Envelope)}) {
        // Nothing is read ahead of the first receive, so that a sender meets the limit of its stream.
        if (a.header_read == 0 && !wanted(from)) break;
        const int64_t count = take(from, reinterpret_cast<char*>(&a.envelope) + a.header_read,
                                   int64_t{sizeof(Envelope)} - a.header_read);
        if (count == 0) break;
        moved = true;
        a.header_read += count;
        if (a.header_read < int64_t{sizeof(Envelope)}) continue;
        a.data_read = 0;
        a.target = match(from, a.envelope);
        if (!a.target)
          a.aside.reset(new Kept{a.envelope, std::vector<char>(static_cast<size_t>(a.envelope.bytes))});
      }
      while (a.data_read < a.envelope.bytes) {
        char* to = (a.target ? a.target->data : a.aside->data.data()) + a.data_read;
        const int64_t count = take(from, to, a.envelope.bytes - a.data_read);
        if (count == 0) break;
        moved = true;
        a.data_read += count;
      }
      if (a.data_read < a.envelope.bytes) break;
      a.header_read = 0;
      if (a.target) {
        a.target->peer = from;
        a.target->done = true;
        a.target.reset();
      } else if (a.is_cancelled) {
        a.aside.reset();
        a.is_cancelled = false;
      } else {
        a.kept.push_back(std::move(a.aside));
        match_kept();
      }
    }
    if (moved && from != rank_) ring(from);  // there is room again
    return moved;
  }

  bool wanted(int from) const {
    return std::any_of(receives_.begin(), receives_.end(),
                       [from](const auto& one) { return one->peer < 0 || one->peer == from; });
  }

  // The receive that a message is for, taken from the list; none if nobody asked for it. A message of another
  // size than asked for fails the receive and is kept aside, out of everyone's way.
  std::shared_ptr<Transfer> match(int from, const Envelope& envelope) {
    for (auto it = receives_.begin(); it != receives_.end(); ++it) {
      Transfer& one = **it;
      if ((one.peer >= 0 && one.peer != from) || one.tag != envelope.tag) continue;
      auto found = *it;
      receives_.erase(it);
      if (one.bytes == envelope.bytes) return found;
      give_up(one, "receive from", from,
              "rank " + std::to_string(from) + " sent " + std::to_string(envelope.bytes) +
                  " bytes; sender and receiver must use one shape and dtype");
      return nullptr;
    }
    return nullptr;
  }

  void match_kept() {
    for (int r = 0; r < segment_.num_ranks(); ++r) {
      auto& kept = arriving_[static_cast<size_t>(r)].kept;
      for (auto it = kept.begin(); it != kept.end();) {
        if (auto target = match(r, (*it)->envelope)) {
          std::memcpy(target->data, (*it)->data.data(), (*it)->data.size());
          target->peer = r;
          target->done = true;
          it = kept.erase(it);
        } else {
          ++it;
        }
      }
    }
  }

  Segment& segment_;
  std::string group_;
  int rank_;
  std::vector<std::deque<std::shared_ptr<Transfer>>> sends_;
  std::list<std::shared_ptr<Transfer>> receives_;
  std::vector<Arriving> arriving_;
};

}  // namespace pypar::shm
