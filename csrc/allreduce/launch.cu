// All-reduce between the GPUs of one node: shared areas, launches, and what the host is told of a time-out.
#include <string>
#include <tuple>
#include <vector>

#include "allreduce/protocol.h"

namespace pypar::cuda {
struct AllReduceMemory {
  void* area;
  void* error;
};
int64_t allreduce_area_bytes(int64_t max_bytes);
int64_t allreduce_half_bytes(int64_t max_bytes);
int64_t allreduce_max_D();
AllReduceMemory allreduce_allocate(int64_t max_bytes, int device);
void allreduce_free(AllReduceMemory memory, int device);
std::string peer_handle(void* address, int device);
void* peer_open(const std::string& handle, int device);
void peer_close(void* address, int device);
void peer_write(void* address, const std::string& data, int device);
std::string peer_read(const void* address, int64_t num_bytes, int device);
void allreduce(const AllReduceCall& call, const AllReduceLaunch& launch);
void allreduce_rms_norm(const AllReduceNormCall& call, const AllReduceLaunch& launch);
// Of every kernel: a part of its name in the machine code, threads and bytes of dynamic shared memory of a
// block (of rows of 4096 elements).
std::vector<std::tuple<std::string, int, int>> allreduce_kernels();
}  // namespace pypar::cuda

#ifndef PYPAR_BINDING

#  include <stdexcept>

#  include "allreduce/kernel.cuh"
#  include "allreduce/peer_memory.h"

namespace pypar::cuda {
namespace {

// More blocks take multiprocessors from what runs beside, and wait for more flags. A seed value of others'
// measurements, not ours.
constexpr int64_t kUsualBlocks = 36;
constexpr int64_t kMaxD = 24576;  // a row and the sums of warps fit into the shared memory of every GPU
constexpr int kPartialBytes = 2 * kReduceWarps * static_cast<int>(sizeof(float));

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("all-reduce on the GPU: " + what);
}

int64_t element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

void check_group(const AllReduceGroup& g) {
  if (g.num_ranks < 2 || g.num_ranks > kMaxRanks) {
    refuse(std::to_string(g.num_ranks) + " ranks; it takes 2 to " + std::to_string(kMaxRanks) +
           " on one node");
  }
  if (g.rank < 0 || g.rank >= g.num_ranks) {
    refuse("rank " + std::to_string(g.rank) + " is not one of " + std::to_string(g.num_ranks));
  }
  for (int r = 0; r < g.num_ranks; ++r) {
    if (g.areas[r] == nullptr || reinterpret_cast<uintptr_t>(g.areas[r]) % 16 != 0) {
      refuse("the area of rank " + std::to_string(r) + " is no address from allreduce_allocate or peer_open");
    }
  }
}

void check_launch(const AllReduceLaunch& l, int64_t bytes) {
  if (l.dtype != kFloat32 && l.dtype != kBFloat16 && l.dtype != kFloat16) {
    refuse("dtype code " + std::to_string(l.dtype) + " is not 0 (float32), 1 (bfloat16) or 2 (float16)");
  }
  if (l.num_blocks < 0 || l.num_blocks > kMaxBlocks) {
    refuse(std::to_string(l.num_blocks) + " blocks; give 1 to " + std::to_string(kMaxBlocks) +
           ", or 0 for a number by size");
  }
  if (bytes > l.max_bytes) {
    refuse(std::to_string(bytes) + " bytes; the group's areas were made for " + std::to_string(l.max_bytes) +
           " at most: make it with a larger max_bytes, or send less at once");
  }
}

void check_aligned(const char* name, const void* pointer, int64_t bytes) {
  if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) != 0) {
    refuse(std::string(name) + "'s address must be a multiple of " + std::to_string(bytes) +
           " bytes, and not null");
  }
}

unsigned choose_blocks(const AllReduceLaunch& l, int64_t wanted) {
  if (l.num_blocks > 0) return static_cast<unsigned>(l.num_blocks);
  return static_cast<unsigned>(wanted < 1 ? 1 : smaller_count(wanted, kUsualBlocks));
}

// Calls visit with the tag of the dtype.
template <class Visit>
void with_type(int dtype, const Visit& visit) {
  if (dtype == kFloat32) {
    visit(Float32Tag{});
  } else if (dtype == kBFloat16) {
    visit(ptx::BFloat16Tag{});
  } else {
    visit(ptx::Float16Tag{});
  }
}

}  // namespace

int64_t allreduce_half_bytes(int64_t max_bytes) {
  if (max_bytes < 1 || max_bytes > int64_t{1} << 40) {
    refuse("max_bytes " + std::to_string(max_bytes) + " is not between 1 and 2^40");
  }
  return (max_bytes + 255) / 256 * 256;
}

int64_t allreduce_area_bytes(int64_t max_bytes) { return kDataOffset + 2 * allreduce_half_bytes(max_bytes); }

int64_t allreduce_max_D() { return kMaxD; }

AllReduceMemory allreduce_allocate(int64_t max_bytes, int device) {
  const int64_t bytes = allreduce_area_bytes(max_bytes);
  const OnDevice on(device);
  void* const area = allocate_device(static_cast<size_t>(bytes));
  try {
    return {area, allocate_pinned(sizeof(AllReduceError))};
  } catch (...) {
    free_device(area);
    throw;
  }
}

void allreduce_free(AllReduceMemory memory, int device) {
  const OnDevice on(device);
  free_device(memory.area);
  free_pinned(memory.error);
}

std::string peer_handle(void* address, int device) {
  const OnDevice on(device);
  unsigned char handle[kHandleBytes];
  export_memory(address, handle);
  return std::string(reinterpret_cast<const char*>(handle), kHandleBytes);
}

void* peer_open(const std::string& handle, int device) {
  if (handle.size() != kHandleBytes) {
    refuse("a handle has " + std::to_string(kHandleBytes) + " bytes, not " + std::to_string(handle.size()));
  }
  const OnDevice on(device);
  return import_memory(reinterpret_cast<const unsigned char*>(handle.data()));
}

void peer_close(void* address, int device) {
  const OnDevice on(device);
  forget_memory(address);
}

void peer_write(void* address, const std::string& data, int device) {
  const OnDevice on(device);
  copy_now(address, data.data(), data.size());
}

std::string peer_read(const void* address, int64_t num_bytes, int device) {
  if (num_bytes < 0 || num_bytes % 4 != 0 || num_bytes > int64_t{1} << 30) {
    refuse("peer_read takes a multiple of 4 bytes up to 2^30, not " + std::to_string(num_bytes));
  }
  check_aligned("peer_read", address, 4);
  std::string data(static_cast<size_t>(num_bytes), '\0');
  if (num_bytes == 0) return data;
  const OnDevice on(device);
  struct Memory {
    void* const data;
    ~Memory() { free_device(data); }
  } memory{allocate_device(data.size())};
  const int64_t count = num_bytes / 4, threads = 128;
  launch(&peer_read_kernel, dim3(static_cast<unsigned>((count + threads - 1) / threads)),
         dim3(static_cast<unsigned>(threads)), 0, nullptr, static_cast<const uint32_t*>(address),
         static_cast<uint32_t*>(memory.data), count);
  copy_now(&data[0], memory.data, data.size());
  return data;
}

void allreduce(const AllReduceCall& call, const AllReduceLaunch& l) {
  check_group(call.group);
  const int64_t bytes = element_bytes(l.dtype);
  if (call.numel < 0 || call.numel > int64_t{1} << 40)
    refuse(std::to_string(call.numel) + " elements; numel is 0 to 2^40");
  check_launch(l, call.numel * bytes);
  if (call.numel == 0) return;
  check_aligned("x", call.x, bytes);
  check_aligned("y", call.y, bytes);
  const int64_t per_block = kReduceThreads * (16 / bytes) * (call.two_shot != 0 ? call.group.num_ranks : 1);
  const OnDevice on(l.device);
  with_type(l.dtype, [&](auto type) {
    pypar::cuda::launch(&allreduce_kernel<decltype(type)>,
                        dim3(choose_blocks(l, (call.numel + per_block - 1) / per_block)),
                        dim3(kReduceThreads), 0, l.stream, call);
  });
}

void allreduce_rms_norm(const AllReduceNormCall& call, const AllReduceLaunch& l) {
  check_group(call.group);
  const int64_t bytes = element_bytes(l.dtype);
  if (call.D < 1 || call.D > kMaxD || call.D * bytes % 16 != 0) {
    refuse("rows of " + std::to_string(call.D) + " elements; the fused form takes multiples of " +
           std::to_string(16 / bytes) + " up to " + std::to_string(kMaxD));
  }
  if (call.rows < 0 || call.rows > int64_t{1} << 31)
    refuse(std::to_string(call.rows) + " rows; it takes 0 to 2^31");
  check_launch(l, call.rows * call.D * bytes);
  if (call.rows == 0) return;
  check_aligned("x", call.x, 16);
  check_aligned("residual", call.residual, 16);
  check_aligned("weight", call.weight, 16);
  check_aligned("residual_out", call.residual_out, 16);
  check_aligned("out", call.out, 16);
  const int64_t ranks = call.two_shot != 0 ? call.group.num_ranks : 1;
  const OnDevice on(l.device);
  with_type(l.dtype, [&](auto type) {
    pypar::cuda::launch(&allreduce_rms_norm_kernel<decltype(type)>,
                        dim3(choose_blocks(l, (call.rows + ranks - 1) / ranks)), dim3(kReduceThreads),
                        static_cast<size_t>(call.D * bytes + kPartialBytes), l.stream, call);
  });
}

std::vector<std::tuple<std::string, int, int>> allreduce_kernels() {
  std::vector<std::tuple<std::string, int, int>> kernels;
  for (const int dtype : {kFloat32, kBFloat16, kFloat16}) {
    const std::string tag = dtype == kFloat32    ? "INS0_10Float32TagE"
                            : dtype == kBFloat16 ? "INS_3ptx11BFloat16TagE"
                                                 : "INS_3ptx10Float16TagE";
    const int row_bytes = 4096 * static_cast<int>(element_bytes(dtype));
    kernels.emplace_back("16allreduce_kernel" + tag, kReduceThreads, 0);
    kernels.emplace_back("25allreduce_rms_norm_kernel" + tag, kReduceThreads, row_bytes + kPartialBytes);
  }
  return kernels;
}

}  // namespace pypar::cuda

#else  // PYPAR_BINDING

#  include <pybind11/stl.h>

namespace py = pybind11;

namespace pypar {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const AllReduceError* failure(const AllReduceError* error) {
  return error != nullptr && __atomic_load_n(&error->state, __ATOMIC_ACQUIRE) != 0 ? error : nullptr;
}

// The group of a dict, and what a launch needs of it. RuntimeError after a time-out.
AllReduceGroup read_group(const py::dict& dict, AllReduceLaunch& launch) {
  AllReduceGroup group{};
  const auto areas = dict["areas"].cast<std::vector<uintptr_t>>();
  if (areas.size() > kMaxRanks) {
    throw py::value_error("all-reduce on the GPU: " + std::to_string(areas.size()) +
                          " ranks; it takes 2 to 8 on one node");
  }
  for (size_t r = 0; r < areas.size(); ++r) group.areas[r] = pointer<unsigned char>(areas[r]);
  group.num_ranks = static_cast<int>(areas.size());
  group.rank = dict["rank"].cast<int>();
  group.error = pointer<AllReduceError>(dict["error"].cast<uintptr_t>());
  launch.max_bytes = dict["max_bytes"].cast<int64_t>();
  launch.device = dict["device"].cast<int>();
  group.half_bytes = cuda::allreduce_half_bytes(launch.max_bytes);
  const auto timeout_ms = dict["timeout_ms"].cast<int64_t>();
  if (timeout_ms < 0 || timeout_ms > int64_t{1} << 40)
    throw py::value_error("all-reduce on the GPU: timeout_ms " + std::to_string(timeout_ms) +
                          " is not 0 (wait for ever) to 2^40");
  group.timeout_ns = static_cast<uint64_t>(timeout_ms) * 1000000;
  if (group.error == nullptr) throw py::value_error("all-reduce on the GPU: the address of error is null");
  if (const AllReduceError* failed = failure(group.error)) {
    throw std::runtime_error("all-reduce on the GPU: rank " + std::to_string(group.rank) +
                             " waited for rank " + std::to_string(failed->peer) + " in call " +
                             std::to_string(failed->call) +
                             (failed->stage == 0 ? ", which did not bring its input"
                                                 : ", which did not bring its part of the sum") +
                             " within the time-out; the group cannot be used any more, make a new one");
  }
  return group;
}

}  // namespace
}  // namespace pypar

PYPAR_BIND(allreduce) {
  using namespace pypar;
  module.def("allreduce_layout", [] {
    py::dict layout;
    layout["max_ranks"] = kMaxRanks;
    layout["max_blocks"] = kMaxBlocks;
    layout["data_offset"] = kDataOffset;
    layout["handle_bytes"] = 64;
    layout["max_D"] = cuda::allreduce_max_D();
    return layout;
  });
  module.def("allreduce_area_bytes", &cuda::allreduce_area_bytes);
  module.def("allreduce_allocate", [](int64_t max_bytes, int device) {
    const cuda::AllReduceMemory memory = cuda::allreduce_allocate(max_bytes, device);
    return py::make_tuple(reinterpret_cast<uintptr_t>(memory.area),
                          reinterpret_cast<uintptr_t>(memory.error));
  });
  module.def("allreduce_free", [](uintptr_t area, uintptr_t error, int device) {
    cuda::allreduce_free({pointer<void>(area), pointer<void>(error)}, device);
  });
  module.def("peer_handle", [](uintptr_t address, int device) {
    return py::bytes(cuda::peer_handle(pointer<void>(address), device));
  });
  module.def("peer_open", [](const py::bytes& handle, int device) {
    return reinterpret_cast<uintptr_t>(cuda::peer_open(handle, device));
  });
  module.def("peer_close",
             [](uintptr_t address, int device) { cuda::peer_close(pointer<void>(address), device); });
  module.def("peer_write", [](uintptr_t address, const py::bytes& data, int device) {
    cuda::peer_write(pointer<void>(address), data, device);
  });
  module.def("peer_read", [](uintptr_t address, int64_t num_bytes, int device) {
    return py::bytes(cuda::peer_read(pointer<void>(address), num_bytes, device));
  });
  module.def("allreduce", [](const py::dict& group, uintptr_t x, uintptr_t y, int64_t numel, int dtype,
                             bool two_shot, int num_blocks, uintptr_t stream) {
    AllReduceLaunch launch{0, pointer<void>(stream), 0, dtype, num_blocks};
    const AllReduceGroup peers = read_group(group, launch);
    py::gil_scoped_release unlocked;
    cuda::allreduce({peers, pointer<void>(x), pointer<void>(y), numel, two_shot}, launch);
  });
  module.def("allreduce_rms_norm", [](const py::dict& group, const py::dict& tensors, int64_t rows, int64_t D,
                                      float eps, int dtype, bool two_shot, int num_blocks, uintptr_t stream) {
    AllReduceLaunch launch{0, pointer<void>(stream), 0, dtype, num_blocks};
    AllReduceNormCall call{};
    call.group = read_group(group, launch);
    const auto address = [&](const char* name) { return pointer<void>(tensors[name].cast<uintptr_t>()); };
    call.x = address("x"), call.residual = address("residual"), call.weight = address("weight");
    call.residual_out = address("residual_out"), call.out = address("out");
    call.rows = rows, call.D = D, call.eps = eps, call.two_shot = two_shot;
    py::gil_scoped_release unlocked;
    cuda::allreduce_rms_norm(call, launch);
  });
  module.def("allreduce_error", [](uintptr_t error) -> py::object {
    const AllReduceError* failed = failure(pointer<AllReduceError>(error));
    if (failed == nullptr) return py::none();
    return py::make_tuple(failed->peer, failed->call, failed->stage);
  });
  module.def("allreduce_kernels", &cuda::allreduce_kernels);
}

#endif
