// The module pypar._native: which instruction set runs, which threads run it, and the bindings of every op.
#if defined(__x86_64__)
#  include <cpuid.h>
#  include <sys/syscall.h>
#endif
#include <unistd.h>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include <pybind11/stl.h>

#include "core/registry.h"

namespace py = pybind11;

namespace pypar {
namespace {

Binding* first_binding = nullptr;

const char* const kIsaNames[kNumIsas] = {"baseline",    "neon", "avx2",    "avx512",
                                         "avx512_bf16", "amx",  "amx_fp16"};

#if defined(__x86_64__)
// Whether the CPU has tiles with bf16 products, and Linux lets this process use them, which it must be asked.
bool ask_for_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kTileBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kTileBf16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Whether the tiles have fp16 products too.
bool has_fp16_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 21) != 0;
}
#endif

bool cpu_has(int isa) {
#if defined(__x86_64__)
  // These also ask the operating system whether it saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case kBaseline:
      return true;
    case kAvx2:
      return avx2;
    case kAvx512:
      return avx512;
    case kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case kAmx:
    case kAmxFp16: {
      static const bool tiles = ask_for_tiles();
      if (isa == kAmxFp16 && !has_fp16_tiles()) return false;
      return avx512 && __builtin_cpu_supports("avx512bf16") && tiles;
    }
    default:
      return false;
  }
#elif defined(__aarch64__)
  return isa == kNeon;
#else
  return isa == kBaseline;
#endif
}

Isa best_isa() {
  int isa = kNumIsas - 1;
  while (isa > 0 && !cpu_has(isa)) --isa;
  return static_cast<Isa>(isa);
}

Isa isa_in_use = best_isa();

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int isa = kNumIsas - 1; isa >= 0; --isa) {
    if (cpu_has(isa)) names.push_back(kIsaNames[isa]);
  }
  return names;
}

void select_isa(const std::string& name) {
  std::string known;
  for (int isa = 0; isa < kNumIsas; ++isa) {
    if (!cpu_has(isa)) continue;
    if (name == kIsaNames[isa]) {
      isa_in_use = static_cast<Isa>(isa);
      return;
    }
    known += known.empty() ? kIsaNames[isa] : std::string(", ") + kIsaNames[isa];
  }
  throw py::value_error("instruction set '" + name + "' is not one that this CPU has: choose from " + known);
}

// libgomp's `GOMP_parallel` of the copy that torch has loaded. Threads of a second pool would compete with
// torch's, which spin for a while after each of its parallel regions.
using ParallelEntry = void (*)(void (*)(void*), void*, unsigned, unsigned);
ParallelEntry parallel_entry = nullptr;

// Threads of our own, only where torch has no libgomp. One parallel region at a time.
class Pool {
 public:
  void run(const std::function<void()>& body, int num_threads) {
    std::lock_guard<std::mutex> one_region(region_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < num_threads - 1) {
        threads_.emplace_back([this, index = static_cast<int>(threads_.size())] { work(index); });
        threads_.back().detach();
      }
      body_ = &body;
      num_wanted_ = num_running_ = num_threads - 1;
      ++round_;
    }
    wake_.notify_all();
    body();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_running_ == 0; });
  }

 private:
  void work(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen && index < num_wanted_; });
      seen = round_;
      const auto* body = body_;
      lock.unlock();
      (*body)();
      lock.lock();
      if (--num_running_ == 0) done_.notify_one();
    }
  }

  std::mutex region_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void()>* body_ = nullptr;
  int num_wanted_ = 0;
  int num_running_ = 0;
  uint64_t round_ = 0;
};

// Never destroyed, since its threads may outlive static objects; a forked child has none of the threads and
// gets a new pool.
Pool& pool() {
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (pool == nullptr || owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

struct Region {
  void (*body)(void*);
  void* data;
  std::mutex mutex;
  std::exception_ptr error;

  static void run(void* data) {
    auto* region = static_cast<Region*>(data);
    try {
      region->body(region->data);
    } catch (...) {
      std::lock_guard<std::mutex> lock(region->mutex);
      if (!region->error) region->error = std::current_exception();
    }
  }
};

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

Isa selected_isa() { return isa_in_use; }

void run_on_threads(void (*body)(void*), void* data, int num_threads) {
  if (num_threads <= 1) {
    body(data);
    return;
  }
  Region region{body, data, {}, {}};
  if (parallel_entry != nullptr) {
    parallel_entry(&Region::run, &region, static_cast<unsigned>(num_threads), 0);
  } else {
    pool().run([&region] { Region::run(&region); }, num_threads);
  }
  if (region.error) std::rethrow_exception(region.error);
}

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  if (scratch.size < bytes) {
    std::free(scratch.memory);
    scratch.size = 0;
    // Whole pages: a kernel's panels then lie alike in the cache whatever was allocated before.
    const size_t size = (bytes + 4095) / 4096 * 4096;
    scratch.memory = std::aligned_alloc(4096, size);
    if (scratch.memory == nullptr) throw std::bad_alloc();
    scratch.size = size;
  }
  return scratch.memory;
}

void yield_thread() { std::this_thread::yield(); }

Binding::Binding(void (*define_names)(py::module_&)) : define(define_names), next(first_binding) {
  first_binding = this;
}

}  // namespace pypar

PYBIND11_MODULE(_native, module) {
  module.doc() = "pypar's CPU kernels. Tensors are passed as addresses, shapes and strides in elements.";
  module.def("supported_isas", &pypar::supported_isas, "Instruction sets that this CPU has, best first.");
  module.def("selected_isa", [] { return pypar::kIsaNames[pypar::selected_isa()]; });
  module.def("select_isa", &pypar::select_isa, py::arg("name"));
  module.def(
      "set_parallel_entry",
      [](uintptr_t address) { pypar::parallel_entry = reinterpret_cast<pypar::ParallelEntry>(address); },
      py::arg("address"), "Takes the address of GOMP_parallel, or 0 for threads of the module's own.");
  for (auto* binding = pypar::first_binding; binding != nullptr; binding = binding->next) {
    binding->define(module);
  }
}
