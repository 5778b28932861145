#include "memory.h"

#include <sys/mman.h>
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "report.h"
#include "shadow.h"

#ifdef SIMT_SANITIZED
#  include <sanitizer/asan_interface.h>
// As the compiler's own checks call them.
extern "C" void __asan_report_load1(void* address);
extern "C" void __asan_report_store1(void* address);
#endif

// The bounds of the static shared variables, see shared_bounds.cpp; and this module's image.
extern __thread char simt_shared_begin[], simt_shared_end[];
extern "C" const char __ehdr_start __attribute__((visibility("hidden")));
extern "C" const char _end __attribute__((visibility("hidden")));

namespace simt {

namespace {

struct Buffer {
  uintptr_t begin, end;
  unsigned shift;  // log2 of the element's bytes
  bool writable;
  bool between_devices;
  std::string name;
  Cell* cells = nullptr;  // one per element, of writable buffers
};

std::vector<Buffer> buffers;  // by address, disjoint
size_t last_buffer = 0;
uintptr_t arguments_begin = 0, arguments_end = 0;
SharedMemory* used = nullptr;  // by the block that has its turn

// Zero pages until they are touched.
Cell* allocate_cells(size_t count) {
  void* memory = mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<Cell*>(memory);
}

void free_cells(Cell* cells, size_t count) {
  if (cells != nullptr) munmap(cells, count * sizeof(Cell));
}

void free_cells(Buffer& buffer) {
  free_cells(buffer.cells, ((buffer.end - buffer.begin) >> buffer.shift) + 1);
  buffer.cells = nullptr;
}

constexpr uintptr_t kNear = 1024;

uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
uintptr_t static_begin() { return address_of(simt_shared_begin) + 16; }  // behind the mark itself
uintptr_t static_end() { return address_of(simt_shared_end); }

// The buffer that holds the address, or null.
Buffer* find_buffer(uintptr_t address) {
  if (last_buffer < buffers.size()) {
    Buffer& last = buffers[last_buffer];
    if (address >= last.begin && address < last.end) return &last;
  }
  const auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                      [](uintptr_t a, const Buffer& buffer) { return a < buffer.begin; });
  if (after == buffers.begin()) return nullptr;
  Buffer& buffer = *(after - 1);
  if (address >= buffer.end) return nullptr;
  last_buffer = static_cast<size_t>(after - 1 - buffers.begin());
  return &buffer;
}

std::string buffer_text(const Buffer& buffer) {
  return (buffer.name.empty() ? "a buffer" : "buffer " + buffer.name) + " of " +
         std::to_string(buffer.end - buffer.begin) + " bytes";
}

std::string how_far(uintptr_t address, uintptr_t begin, uintptr_t end, const std::string& name) {
  const uintptr_t distance = address < begin ? begin - address : address - end;
  return (distance == 0 ? "just" : std::to_string(distance) + " bytes") +
         (address < begin ? " before " : " after the end of ") + name;
}

// What is near an address that no buffer holds.
std::string nearest_text(uintptr_t address) {
  const uintptr_t dynamic = address_of(machine.shared), fixed = static_begin();
  if (address + kNear >= fixed && address < static_end() + kNear) {
    return how_far(address, fixed, static_end(), "static shared memory");
  }
  if (address + kNear >= dynamic && address < dynamic + kMaxSharedBytes + kNear) {
    return how_far(address, dynamic, dynamic + used->dynamic_bytes, "dynamic shared memory");
  }
  const Buffer* best = nullptr;
  uintptr_t distance = 1 << 20;
  for (const Buffer& buffer : buffers) {
    const uintptr_t d = address < buffer.begin ? buffer.begin - address : address - buffer.end;
    if (d < distance) distance = d, best = &buffer;
  }
  if (best != nullptr) return how_far(address, best->begin, best->end, buffer_text(*best));
  return "address " + std::to_string(address) + ", which is in or near no buffer";
}

const char* verb(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "updates";
}

std::string access_text(const Thread& t, size_t bytes, Access access) {
  return thread_name(t) + " " + verb(access) + " " + std::to_string(bytes) + " bytes";
}

[[noreturn]] void out_of_bounds(const Thread& t, size_t bytes, Access access, const void* site,
                                const std::string& where) {
  stop_with("out of bounds", access_text(t, bytes, access) + " at $1: " + where, site);
}

// In the shared segment `name`; `offset` is from its beginning.
void check_segment(Thread& t, Cell* cells, size_t offset, size_t bytes, size_t limit, const char* name,
                   Access access, const void* site) {
  if (offset + bytes > limit) {
    out_of_bounds(t, bytes, access, site,
                  "byte " + std::to_string(offset) + " of " + std::to_string(limit) + " of " + name);
  }
  if (kChecked) check_cells(t, cells + offset, bytes, true, access, site, {name, offset, 0});
}

bool check_shared_access(Thread& t, uintptr_t address, size_t bytes, Access access, const void* site) {
  const uintptr_t dynamic = address_of(machine.shared);
  if (address >= dynamic && address < dynamic + kMaxSharedBytes) {
    check_segment(t, used->dynamic_cells, address - dynamic, bytes, used->dynamic_bytes,
                  "dynamic shared memory", access, site);
    return true;
  }
  if (address >= static_begin() && address < static_end()) {
    check_segment(t, used->static_cells, address - static_begin(), bytes, static_shared_bytes(),
                  "static shared memory", access, site);
    return true;
  }
  return false;
}

// Constants and __device__ variables; arguments; other threads' stacks.
void check_elsewhere(const Thread& t, uintptr_t address, size_t bytes, Access access, const void* site) {
  if (address >= address_of(&__ehdr_start) && address < address_of(&_end)) return;
  if (address >= arguments_begin && address + bytes <= arguments_end && access == Access::kRead) return;
  for (unsigned i = 0; i < machine.block->num_threads; ++i) {
    const Thread& other = machine.threads[i];
    if (address - address_of(other.stack) < kStackBytes) {
      out_of_bounds(t, bytes, access, site, "a variable of " + thread_name(other));
    }
  }
  out_of_bounds(t, bytes, access, site, nearest_text(address));
}

}  // namespace

void register_buffer(uintptr_t address, size_t bytes, size_t element_bytes, bool writable,
                     const std::string& name, bool between_devices) {
  if (bytes == 0 || !kChecked) return;
  unsigned shift = 0;
  while ((size_t{2} << shift) <= element_bytes) ++shift;
  Buffer added{address, address + bytes, shift, writable, between_devices, name};
  // Overlapping inputs, slices of one tensor, become one buffer.
  auto at = buffers.begin();
  while (at != buffers.end() && at->begin < added.end) {
    if (at->begin == added.begin && at->end == added.end && at->shift == shift) return;
    if (at->end <= added.begin) {
      ++at;
      continue;
    }
    if (!writable && !at->writable) {
      added.begin = std::min(added.begin, at->begin);
      added.end = std::max(added.end, at->end);
    }
    free_cells(*at);
    at = buffers.erase(at);
  }
  if (writable) added.cells = allocate_cells((bytes >> shift) + 1);
  buffers.insert(at, added);
}

void clear_buffers() {
  for (Buffer& buffer : buffers) free_cells(buffer);
  buffers.clear();
}

void allow_arguments(const void* address, size_t bytes) {
  arguments_begin = address_of(address);
  arguments_end = arguments_begin + bytes;
}

size_t static_shared_bytes() {
#ifdef SIMT_SANITIZED
  return 0;
#else
  return static_end() - static_begin();
#endif
}

bool is_shared(const void* pointer) {
  const uintptr_t address = address_of(pointer), dynamic = address_of(machine.shared);
  return (address >= dynamic && address < dynamic + kMaxSharedBytes) ||
         (address >= static_begin() && address < static_end());
}

uint32_t shared_address(const void* pointer) {
  const uintptr_t address = address_of(pointer), dynamic = address_of(machine.shared);
  const bool is_dynamic = address >= dynamic && address < dynamic + kMaxSharedBytes;
  return static_cast<uint32_t>(is_dynamic ? static_shared_bytes() + (address - dynamic)
                                          : address - static_begin());
}

SharedMemory::SharedMemory() : dynamic(static_cast<char*>(std::aligned_alloc(1024, kMaxSharedBytes + 1024))) {
  if (dynamic == nullptr) throw std::bad_alloc();
  if (kChecked) dynamic_cells = allocate_cells(kMaxSharedBytes);
}

SharedMemory::~SharedMemory() {
#ifdef SIMT_SANITIZED
  __asan_unpoison_memory_region(dynamic, kMaxSharedBytes);
#endif
  std::free(dynamic);
  free_cells(dynamic_cells, kMaxSharedBytes);
  free_cells(static_cells, static_cells_bytes);
  if (used == this) used = nullptr;
}

void put_shared(SharedMemory& memory) {
#ifndef SIMT_SANITIZED
  memory.static_part.assign(simt_shared_begin + 16, static_shared_bytes());
#endif
}

void use_shared(SharedMemory& memory) {
  used = &memory;
  machine.shared = memory.dynamic;
#ifndef SIMT_SANITIZED
  if (!memory.static_part.empty()) {
    std::memcpy(simt_shared_begin + 16, memory.static_part.data(), static_shared_bytes());
  }
#endif
}

void poison_shared(size_t bytes) {
  constexpr int kPoison = 0xff;  // not a number, in every type
  used->dynamic_bytes = bytes;
#ifdef SIMT_SANITIZED
  __asan_unpoison_memory_region(machine.shared, bytes);
  __asan_poison_memory_region(machine.shared + bytes, kMaxSharedBytes - bytes);
#else
  std::memset(simt_shared_begin + 16, kPoison, static_shared_bytes());
  if (kChecked && used->static_cells_bytes < static_shared_bytes()) {
    used->static_cells_bytes = static_shared_bytes();
    used->static_cells = allocate_cells(used->static_cells_bytes);
  }
#endif
  std::memset(machine.shared, kPoison, bytes);
}

bool check_access(Thread& t, const void* pointer, size_t bytes, Access access, const void* site) {
  const uintptr_t address = address_of(pointer);
  const bool aligned = bytes > 16 || (bytes & (bytes - 1)) != 0 || (address & (bytes - 1)) == 0;
  if (!aligned) {
    stop_with("misaligned",
              access_text(t, bytes, access) + " at $1, " + std::to_string(address & (bytes - 1)) +
                  " bytes after a multiple of " + std::to_string(bytes),
              site);
  }
  if (check_shared_access(t, address, bytes, access, site) || !kChecked) return false;
  Buffer* buffer = find_buffer(address);
  if (buffer == nullptr) {
    check_elsewhere(t, address, bytes, access, site);
    return false;
  }
  if (address + bytes > buffer->end) {
    out_of_bounds(t, bytes, access, site,
                  "from byte " + std::to_string(address - buffer->begin) + " of " + buffer_text(*buffer));
  }
  if (!buffer->writable) {
    if (access == Access::kRead) return false;
    out_of_bounds(t, bytes, access, site, buffer_text(*buffer) + " is an input and must not change");
  }
  const size_t first = (address - buffer->begin) >> buffer->shift;
  const size_t last = (address + bytes - 1 - buffer->begin) >> buffer->shift;
  check_cells(
      t, buffer->cells + first, last - first + 1, false, access, site,
      {buffer->name.empty() ? "global memory" : buffer->name.c_str(), first << buffer->shift, buffer->shift});
  return buffer->between_devices;
}

void check_shared(Thread& t, const void* pointer, size_t bytes, Access access, const void* site,
                  const char* what) {
#ifdef SIMT_SANITIZED
  (void)what;  // the sanitizer knows what may be touched
  if ((address_of(pointer) & (bytes - 1)) != 0) check_access(t, pointer, bytes, access, site);
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(pointer), bytes)) {
    access == Access::kRead ? __asan_report_load1(bad) : __asan_report_store1(bad);
  }
#else
  if (!is_shared(pointer)) {
    stop_with("out of bounds", thread_name(t) + " gives " + what + " at $1 an address outside shared memory",
              site);
  }
  check_access(t, pointer, bytes, access, site);
#endif
}

namespace {

Cell* shared_cells(const void* pointer) {
  const uintptr_t address = address_of(pointer), dynamic = address_of(machine.shared);
  const bool is_dynamic = address >= dynamic && address < dynamic + kMaxSharedBytes;
  return is_dynamic ? used->dynamic_cells + (address - dynamic)
                    : used->static_cells + (address - static_begin());
}

}  // namespace

void mark_pending(Thread& t, const void* address, size_t bytes, const void* site) {
  if (kChecked) set_pending(t, shared_cells(address), bytes, site);
}

void mark_arrived(Thread& t, const void* address, size_t bytes, const void* site) {
  if (kChecked) set_arrived(t, shared_cells(address), bytes, site);
}

}  // namespace simt
