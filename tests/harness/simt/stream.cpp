// Streams as queues: what is put into one runs in its order, at a synchronisation; streams among each other
// in the order of Options::block_order, since a GPU promises none. With Options::concurrent each is a device,
// and kernels at the heads of several run at the same time.
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>

#include "devices.h"

struct SimtEvent {
  uint64_t recorded = 0, reached = 0;
};

struct SimtStream {
  struct Item {
    std::function<void()> run;
    std::function<bool()> ready;
    std::shared_ptr<simt::Call> call;  // of a kernel, instead of `run`
  };
  std::deque<Item> items;
};

namespace {

std::vector<SimtStream*> streams;

bool ready(const SimtStream& stream) {
  return !stream.items.empty() && (!stream.items.front().ready || stream.items.front().ready());
}

constexpr const char* kStuck = "streams wait for events that nothing queued will record";

void run_item(const SimtStream::Item& item) {
  item.call != nullptr ? simt::run_call(*item.call) : item.run();
}

// The stream's next kernel, if it can start; what stands before it is done. `advanced` if anything was.
std::shared_ptr<simt::Call> next_call(SimtStream& stream, bool& advanced) {
  while (ready(stream)) {
    const auto item = std::move(stream.items.front());
    stream.items.pop_front();
    advanced = true;
    if (item.call != nullptr) return item.call;
    item.run();
  }
  return nullptr;
}

// Runs all streams, as devices, until all are empty.
void drain_devices() {
  try {
    for (;;) {
      bool advanced = false, pending = false;
      simt::run_devices(static_cast<unsigned>(streams.size()),
                        [&](unsigned device) { return next_call(*streams[device], advanced); });
      for (const SimtStream* s : streams) pending |= !s->items.empty();
      if (!pending) return;
      if (!advanced) throw std::runtime_error(kStuck);
    }
  } catch (...) {
    for (SimtStream* s : streams) s->items.clear();
    throw;
  }
}

// Runs until `stream` is empty, or all are if it is null. After a fault what was queued is dropped.
void drain(const SimtStream* stream) {
  if (simt::machine.options.concurrent) return drain_devices();
  for (;;) {
    bool pending = false;
    std::vector<SimtStream*> able;
    for (SimtStream* s : streams) {
      if (ready(*s)) able.push_back(s);
      pending |= !s->items.empty() && (stream == nullptr || s == stream);
    }
    if (!pending) return;
    if (able.empty()) throw std::runtime_error(kStuck);
    size_t chosen = 0;
    if (simt::machine.options.block_order == simt::Order::kReverse) chosen = able.size() - 1;
    if (simt::machine.options.block_order == simt::Order::kRandom) chosen = simt::next_random() % able.size();
    const auto item = std::move(able[chosen]->items.front());
    able[chosen]->items.pop_front();
    try {
      run_item(item);
    } catch (...) {
      for (SimtStream* s : streams) s->items.clear();
      throw;
    }
  }
}

void enqueue(cudaStream_t stream, std::function<void()> run, std::function<bool()> is_ready = {}) {
  if (stream == nullptr) {
    drain(nullptr);
    run();
    return;
  }
  stream->items.push_back({std::move(run), std::move(is_ready), nullptr});
}

}  // namespace

namespace simt {

void submit(Call* call, void* stream) {
  std::shared_ptr<Call> owned(call);
  if (stream == nullptr) return enqueue(nullptr, [owned] { run_call(*owned); });
  static_cast<cudaStream_t>(stream)->items.push_back({{}, {}, std::move(owned)});
}

}  // namespace simt

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = streams.emplace_back(new SimtStream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  drain(stream);
  for (auto it = streams.begin(); it != streams.end(); ++it) {
    if (*it == stream) {
      streams.erase(it);
      delete stream;
      return cudaSuccess;
    }
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  drain(stream);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  drain(nullptr);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new SimtEvent;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  drain(nullptr);
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const uint64_t number = ++event->recorded;
  enqueue(stream, [event, number] { event->reached = number; });
  return cudaSuccess;
}

// Waits for the latest record that was queued before this call, if there is one.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const uint64_t number = event->recorded;
  enqueue(stream, [] {}, [event, number] { return event->reached >= number; });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  enqueue(stream, [=] { std::memset(pointer, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  enqueue(stream, [=] { std::memmove(target, source, bytes); });
  return cudaSuccess;
}
