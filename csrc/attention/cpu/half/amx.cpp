// Attention in bf16 (amx) and in fp16 (amx_fp16) with the tile registers of AMX. Everything else runs with
// the next lower instruction set, so this file is all that is compiled for the two.
#include "attention/arguments.h"

namespace pypar {
PYPAR_KERNEL(attention_forward, AttentionForward)
PYPAR_KERNEL(attention_backward, AttentionBackward)
}  // namespace pypar

#if defined(__AMX_BF16__) && !defined(PYPAR_BINDING)

#  include "attention/cpu/half/backward.h"
#  include "attention/cpu/half/forward.h"

namespace pypar::PYPAR_ISA {

#  if defined(PYPAR_FP16_TILES)
namespace fallback = pypar::amx;
#  else
namespace fallback = pypar::avx512_bf16;
#  endif

void attention_forward(const AttentionForward& a) {
  return half::takes(a) ? half::attention_forward(a) : fallback::attention_forward(a);
}

void attention_backward(const AttentionBackward& a) {
  return half::takes(a) ? half::attention_backward(a) : fallback::attention_backward(a);
}

}  // namespace pypar::PYPAR_ISA

#endif
