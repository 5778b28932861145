// What the compiler calls before each memory access of a kernel: the checked flavour is compiled with
// -fsanitize=thread,alignment,bounds, and these take the place of the sanitizers' own runtimes.
#include "devices.h"
#include "memory.h"
#include "report.h"

namespace {

using simt::Access;

inline void on_access(const void* address, size_t bytes, Access access, const void* site) {
  simt::Thread* t = simt::current;
  if (t == nullptr) return;  // host code
  if (static_cast<size_t>(static_cast<const char*>(address) - t->stack) < simt::kStackBytes) return;
  simt::before_access(*t);
  const bool between_devices = simt::check_access(*t, address, bytes, access, site);
  if (between_devices && access == Access::kWrite) simt::delay_store(*t, address, bytes);
}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct OutOfBounds {
  SourceLocation location;
  const void *array_type, *index_type;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

}  // namespace

#define SIMT_HOOK(name, bytes, access) \
  void name(const void* address) { on_access(address, bytes, access, __builtin_return_address(0)); }
#define SIMT_HOOKS(bytes)                                       \
  SIMT_HOOK(__tsan_read##bytes, bytes, Access::kRead)           \
  SIMT_HOOK(__tsan_write##bytes, bytes, Access::kWrite)         \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, Access::kRead) \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, Access::kWrite)

// Of atomics only what host code beside the kernels uses, std::shared_ptr and initialisers of local statics.
#define SIMT_HOST_ATOMICS(bits, type)                                                              \
  type __tsan_atomic##bits##_load(const volatile type* p, int) { return __atomic_load_n(p, 5); }   \
  void __tsan_atomic##bits##_store(volatile type* p, type v, int) { __atomic_store_n(p, v, 5); }   \
  type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {                             \
    return __atomic_exchange_n(p, v, 5);                                                           \
  }                                                                                                \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) {                            \
    return __atomic_fetch_add(p, v, 5);                                                            \
  }                                                                                                \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) {                            \
    return __atomic_fetch_sub(p, v, 5);                                                            \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* e, type v, int, int) { \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                                      \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* e, type v, int, int) {   \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                                      \
  }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
SIMT_HOOK(__tsan_read1, 1, Access::kRead)
SIMT_HOOK(__tsan_write1, 1, Access::kWrite)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
SIMT_HOOK(__tsan_vptr_read, sizeof(void*), Access::kRead)
void __tsan_vptr_update(void** address, void*) {
  on_access(address, sizeof(void*), Access::kWrite, __builtin_return_address(0));
}
// Ranges are copies of structs: they need not be aligned to their size.
void __tsan_read_range(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    on_access(static_cast<const char*>(address) + i, 1, Access::kRead, __builtin_return_address(0));
  }
}
void __tsan_write_range(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    on_access(static_cast<const char*>(address) + i, 1, Access::kWrite, __builtin_return_address(0));
  }
}
SIMT_HOST_ATOMICS(8, uint8_t)
SIMT_HOST_ATOMICS(16, uint16_t)
SIMT_HOST_ATOMICS(32, uint32_t)
SIMT_HOST_ATOMICS(64, uint64_t)

// An access through a pointer that is not a multiple of its type's alignment, of vectors like float4 too.
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
  simt::Thread* t = simt::current;
  if (t == nullptr) return;
  const uintptr_t wanted = uintptr_t{1} << data->log_alignment;
  simt::stop_with("misaligned",
                  simt::thread_name(*t) + " uses an address " + std::to_string(pointer & (wanted - 1)) +
                      " bytes after a multiple of " + std::to_string(wanted) +
                      ", which its type asks for, at $1",
                  __builtin_return_address(0));
}

// An index beyond an array whose length the compiler knows: a shared or a local one, or one in a struct.
void __ubsan_handle_out_of_bounds(const OutOfBounds*, uintptr_t index) {
  simt::Thread* t = simt::current;
  if (t == nullptr) return;
  simt::stop_with("out of bounds",
                  simt::thread_name(*t) + " takes element " + std::to_string(static_cast<intptr_t>(index)) +
                      " of a shorter array at $1",
                  __builtin_return_address(0));
}
void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data, uintptr_t index) {
  __ubsan_handle_out_of_bounds(data, index);
}
void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uintptr_t pointer) {
  __ubsan_handle_type_mismatch_v1(data, pointer);
}

}  // extern "C"
