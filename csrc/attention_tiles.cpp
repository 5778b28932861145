// Attention in bf16 with the tile registers of AMX; everything else runs with the next poorer instruction
// set, so this file is all that is compiled for AMX.
#include "attention.h"

namespace pypar {
PYPAR_KERNEL(attention_forward, AttentionForward)
PYPAR_KERNEL(attention_backward, AttentionBackward)
}  // namespace pypar

#if defined(__AMX_BF16__) && !defined(PYPAR_BINDING)

#  include "attention_bf16_backward.h"
#  include "attention_bf16_forward.h"

namespace pypar::PYPAR_ISA {

void attention_forward(const AttentionForward& a) {
  return pypar::bf16::suits(a.problem) ? bf16::attention_forward(a) : avx512_bf16::attention_forward(a);
}

void attention_backward(const AttentionBackward& a) {
  const bool suits = pypar::bf16::suits(a.problem) && !a.dbias;
  return suits ? bf16::attention_backward(a) : avx512_bf16::attention_backward(a);
}

}  // namespace pypar::PYPAR_ISA

#endif
