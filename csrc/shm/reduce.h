// What shared-memory collectives hand to their reduction kernel.
#pragma once

#include "core/registry.h"

namespace pypar {

enum ShmType : int {  // the first three are ElementType's
  kShmFloat32,
  kShmBFloat16,
  kShmFloat16,
  kShmFloat64,
  kShmUInt8,
  kShmInt8,
  kShmInt16,
  kShmInt32,
  kShmInt64,
  kShmBool,
  kShmBytes,  // anything that is only moved
  kNumShmTypes
};
enum ShmOp : int {
  kShmSum,
  kShmAverage,
  kShmProduct,
  kShmMin,
  kShmMax,
  kShmAnd,
  kShmOr,
  kShmXor,
  kNumShmOps
};

constexpr int kShmTypeBytes[kNumShmTypes] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 1, 1};

// out[i] = inputs[0][i] op inputs[1][i] op ..., always in one order, in fp32 for bf16 and fp16: neighbours
// first, then neighbours of their results, ((0 1) (2 3)) ((4 5) 6). So groups of 2, 4, 8, ... neighbours may
// be reduced first, and their results then, with the same bits. `out` may be one of the inputs. `copy`,
// unless null, receives the same.
struct ShmReduce {
  const void* const* inputs;
  int num_inputs;
  void* out;
  void* copy;
  int64_t count;
  int type;
  int op;
};

PYPAR_KERNEL(shm_reduce, ShmReduce)

}  // namespace pypar
