// Where each choice of an expert goes: a stable counting sort. Contract in pypar/ops/moe_permute.
#include "core/registry.h"

namespace pypar {

struct MoePermuteOrder {
  const int64_t* experts;  // [choices], each in [0, num_experts), or -1
  int64_t* counts;         // [num_experts]
  int64_t* places;         // [choices]: the row of each choice, or ~row of one that has no expert
  int64_t* sources;        // [choices]: the choice of each row
  int64_t* starts;         // [blocks, num_experts + 1]: scratch
  int64_t* wrong;          // [blocks]: scratch
  int64_t choices, num_experts, block;
  int num_threads;
  int64_t* first_wrong;  // the first choice that names no expert, -1: there is none
};

PYPAR_KERNEL(moe_permute_order, MoePermuteOrder)

}  // namespace pypar

#ifndef PYPAR_BINDING

#  include "core/parallel.h"
#  include "core/simd.h"

namespace pypar::PYPAR_ISA {

// Blocks of choices count their experts side by side; an expert's rows are those of the first block, then
// those of the second, and so on, which is the order of the choices, whatever thread has which block.
void moe_permute_order(const MoePermuteOrder& a) {
  const int64_t E = a.num_experts, blocks = (a.choices + a.block - 1) / a.block;
  const auto for_choices = [&](int64_t block, const auto& body) {
    const int64_t end = smaller(a.choices, (block + 1) * a.block);
    for (int64_t i = block * a.block; i < end; ++i) body(i);
  };
  parallel_for(blocks, 1, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t* counts = a.starts + block * (E + 1);
      for (int64_t e = 0; e <= E; ++e) counts[e] = 0;
      a.wrong[block] = -1;
      for_choices(block, [&](int64_t i) {
        const int64_t expert = a.experts[i];
        if (expert >= -1 && expert < E) {
          ++counts[expert < 0 ? E : expert];
        } else if (a.wrong[block] < 0) {
          a.wrong[block] = i;
        }
      });
    }
  });
  *a.first_wrong = -1;
  for (int64_t block = blocks; block-- > 0;) {
    if (a.wrong[block] >= 0) *a.first_wrong = a.wrong[block];
  }
  if (*a.first_wrong >= 0) return;
  int64_t next = 0;
  for (int64_t e = 0; e <= E; ++e) {
    const int64_t first = next;
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t& start = a.starts[block * (E + 1) + e];
      const int64_t count = start;
      start = next;
      next += count;
    }
    if (e < E) a.counts[e] = next - first;
  }
  parallel_for(blocks, 1, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t* starts = a.starts + block * (E + 1);
      for_choices(block, [&](int64_t i) {
        const int64_t expert = a.experts[i], row = starts[expert < 0 ? E : expert]++;
        a.places[i] = expert < 0 ? ~row : row;
        a.sources[row] = i;
      });
    }
  });
}

}  // namespace pypar::PYPAR_ISA

#else

PYPAR_BIND(moe_permute_order) {
  module.def("moe_permute_order",
             [](uintptr_t experts, uintptr_t counts, uintptr_t places, uintptr_t sources, uintptr_t starts,
                uintptr_t wrong, int64_t choices, int64_t num_experts, int64_t block, int num_threads) {
               int64_t first_wrong = -1;
               pypar::launch<pypar::moe_permute_order_kernels>(pypar::MoePermuteOrder{
                   reinterpret_cast<const int64_t*>(experts), reinterpret_cast<int64_t*>(counts),
                   reinterpret_cast<int64_t*>(places), reinterpret_cast<int64_t*>(sources),
                   reinterpret_cast<int64_t*>(starts), reinterpret_cast<int64_t*>(wrong), choices,
                   num_experts, block, num_threads, &first_wrong});
               return first_wrong;
             });
}

#endif
