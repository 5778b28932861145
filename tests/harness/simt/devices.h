// Several devices at once: with Options::concurrent every stream is a device, and the blocks of all their
// kernels run by turns. What a device writes to memory between devices (register_buffer) with plain stores,
// the others see late: after a release that is ordered behind the store, at the end of the kernel, or at any
// moment before. Between devices nothing is ordered but by store_system and load_system with release and
// acquire: other accesses that meet are races.
#pragma once

#include <functional>
#include <memory>

#include "machine.h"

namespace simt {

// Any access of a kernel, of the checked flavour; ends of barriers. Other devices may get a turn.
void before_access(Thread& t);
// Keeps back what this access is about to store. `bytes` is at most 16.
void delay_store(const Thread& t, const void* address, size_t bytes);
// At a barrier: what some of the block's threads acquired, all know.
void join_acquired(Block& block);

// A device's next kernel, or null when it has none that could start.
using NextCall = std::function<std::shared_ptr<Call>(unsigned device)>;
// Runs what next gives until it gives nothing more to any of the devices. Throws std::runtime_error with the
// findings.
void run_devices(unsigned num_devices, const NextCall& next);

}  // namespace simt
