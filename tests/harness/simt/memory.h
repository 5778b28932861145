// What memory a kernel may touch, and what is known of each byte: who wrote and read it last, and whether a
// copy is under way. In the checked flavour every access of a kernel comes here (hooks.cpp); else only those
// of ptx.h.
#pragma once

#include <string>

#include "machine.h"

namespace simt {

#ifdef SIMT_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

enum class Access : uint8_t { kRead, kWrite, kAtomic };

struct Cell;

// A block's: the dynamic part, what is known of both parts, and the static part while another block has its
// turn, since the compiler gives that one address.
struct SharedMemory {
  char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  Cell* dynamic_cells = nullptr;
  Cell* static_cells = nullptr;
  size_t static_cells_bytes = 0;
  std::string static_part;

  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
};
// Takes it from the block that has its turn; gives it to the one that has it next.
void put_shared(SharedMemory& memory);
void use_shared(SharedMemory& memory);

// Memory that a tensor or buffer gave. Accesses by different threads that overlap in one element of
// element_bytes (a power of two) are taken to touch the same bytes. What overlaps it and was registered
// before is forgotten. Other devices see plain stores to what is `between_devices` late.
void register_buffer(uintptr_t address, size_t bytes, size_t element_bytes, bool writable,
                     const std::string& name, bool between_devices = false);
void clear_buffers();

// Kernel arguments.
void allow_arguments(const void* address, size_t bytes);

// Sets the block's shared memory to NaN patterns and forgets what was written there.
void poison_shared(size_t dynamic_bytes);
size_t static_shared_bytes();
bool is_shared(const void* address);

// Reports a fault of this access. Does not return if it must not be made. Whether the memory is between
// devices.
bool check_access(Thread& t, const void* address, size_t bytes, Access access, const void* site);
// The same for what must be in shared memory, and must be a multiple of `bytes`.
void check_shared(Thread& t, const void* address, size_t bytes, Access access, const void* site,
                  const char* what);
// Bytes in shared memory wait for an asynchronous copy by `t`; they have arrived.
void mark_pending(Thread& t, const void* address, size_t bytes, const void* site);
void mark_arrived(Thread& t, const void* address, size_t bytes, const void* site);

}  // namespace simt
