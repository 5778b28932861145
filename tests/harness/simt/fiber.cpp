#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>
#include <cstdint>
#include <cstring>
#include <new>

#ifdef SIMT_SANITIZED
#  include <sanitizer/asan_interface.h>
#endif

// Only what a called function must preserve is saved.
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size simt_switch_stack, .-simt_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, %function
simt_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch_stack, .-simt_switch_stack
)");
#else
#  error "the host runtime switches stacks on x86-64 and aarch64 only"
#endif

namespace simt {

char* allocate_stack(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(memory) + page;
}

void* start_fiber(char* stack, size_t bytes, void (*entry)()) {
#ifdef SIMT_SANITIZED
  __asan_unpoison_memory_region(stack, bytes);  // frames that an earlier launch gave up
#endif
#if defined(__x86_64__)
  // Six registers, the entry, and no return address: at the entry the stack pointer is 8 below a multiple
  // of 16.
  auto* top = reinterpret_cast<uintptr_t*>(stack + bytes) - 10;
  std::memset(top, 0, 10 * sizeof(uintptr_t));
  top[6] = reinterpret_cast<uintptr_t>(entry);
#else
  auto* top = reinterpret_cast<uintptr_t*>(stack + bytes) - 32;
  std::memset(top, 0, 32 * sizeof(uintptr_t));
  top[11] = reinterpret_cast<uintptr_t>(entry);  // x30
#endif
  return top;
}

}  // namespace simt
