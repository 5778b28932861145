// Work sharing inside a kernel, over the threads of `run_on_threads`.
#pragma once

#include "core/registry.h"

namespace pypar::PYPAR_ISA {

template <class Body>
struct SharedLoop {
  const Body* body;
  int64_t count;
  int64_t chunk;
  int64_t next;  // the first index that no thread has taken yet

  static void run(void* data) {
    auto* loop = static_cast<SharedLoop*>(data);
    for (;;) {
      const int64_t begin = __atomic_fetch_add(&loop->next, loop->chunk, __ATOMIC_RELAXED);
      if (begin >= loop->count) return;
      const int64_t end = begin + loop->chunk < loop->count ? begin + loop->chunk : loop->count;
      (*loop->body)(begin, end);
    }
  }
};

// Calls body(begin, end) for ranges of at most `chunk` indices that together are [0, count). Idle threads
// take the next range, in ascending order: begin with the longest work. Which thread runs what differs from
// run to run, so a body's result must depend on its range alone (or on what earlier ranges are known to have
// ended).
template <class Body>
static void parallel_for(int64_t count, int64_t chunk, int num_threads, const Body& body) {
  if (count <= 0) return;
  const int64_t num_chunks = (count + chunk - 1) / chunk;
  if (num_threads > num_chunks) num_threads = static_cast<int>(num_chunks);
  if (num_threads <= 1) {
    body(0, count);
    return;
  }
  SharedLoop<Body> loop{&body, count, chunk, 0};
  run_on_threads(&SharedLoop<Body>::run, &loop, num_threads);
}

}  // namespace pypar::PYPAR_ISA
