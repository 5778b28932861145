// Switching between stacks: a CUDA thread is a fiber with a stack of its own.
#pragma once

#include <cstddef>

namespace simt {

// Memory for a stack, with an unmapped page below.
char* allocate_stack(size_t bytes);

// The stack pointer of a fiber that calls entry() when it is first switched to. entry never returns.
void* start_fiber(char* stack, size_t bytes, void (*entry)());

// Saves where the caller is and goes on at `to`.
extern "C" void simt_switch_stack(void** save, void* to);

}  // namespace simt
