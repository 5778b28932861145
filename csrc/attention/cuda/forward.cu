// Attention, forward, on a GPU: which kernel runs, on how many blocks.
#include <string>
#include <tuple>
#include <vector>

#include "attention/arguments.h"

namespace pypar::cuda {
int64_t attention_forward_memory(const AttentionProblem& problem);
void attention_forward(const AttentionForward& arguments);
// Of every kernel: a part of its name in the machine code, threads and bytes of dynamic shared memory of a
// block.
std::vector<std::tuple<std::string, int, int>> attention_forward_kernels();
}  // namespace pypar::cuda

#ifndef PYPAR_BINDING

#  include <stdexcept>
#  include <typeinfo>

#  include "attention/cuda/forward_fp32.cuh"

namespace pypar::cuda {
namespace {

constexpr int64_t kMostSplits = 128;
constexpr int64_t kLeastBlocksPerSplit = 4;  // of keys: less work would not pay for combining the parts
constexpr int64_t kBlocksPerMultiprocessor = 2;

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("attention on the GPU: " + what);
}

void check_tensor(const char* name, const AttentionTensor& x) {
  const int64_t bytes = x.dtype == kFloat32 ? 4 : 2;
  const bool whole = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride * bytes % 16 == 0 &&
                     x.position_stride * bytes % 16 == 0 && x.head_stride * bytes % 16 == 0;
  if (x.element_stride != 1 || !whole) {
    refuse(std::string(name) +
           "'s rows must be contiguous and begin at multiples of 16 bytes; make it contiguous");
  }
}

void check_problem(const AttentionProblem& p) {
  for (const int64_t size : {p.H, p.Hv}) {
    if (size % 8 != 0 || size > 256) {
      refuse("head size " + std::to_string(size) + " is not a multiple of 8 up to 256");
    }
  }
  if (p.T * (p.N / p.G) >= kFar || p.S >= kFar) refuse("2^30 positions are too many");
  if (p.B >= kFar) refuse("2^30 sequences are too many");
}

template <int kNumber>
struct Number {
  static constexpr int kValue = kNumber;
};

// Calls visit(shape) with the shape of the kernel for this problem.
template <class Visit>
void with_shape(const AttentionProblem& p, const Visit& visit) {
  const int64_t sequences = p.cu_seqlens_q != nullptr && p.B > 0 ? p.B : 1;
  const bool few_rows = p.T * (p.N / p.G) <= 16 * sequences;
  // The plain kernel takes maxima before it scales.
  const bool modified = modifies_scores(p) || !(p.scale > 1e-20f && p.scale < 1e20f);
  const auto by_rows = [&](auto type, auto head) {
    using Type = decltype(type);
    constexpr int kHead = decltype(head)::kValue;
    if (few_rows) {
      visit(ForwardShape<Type, kHead, true, true>{});
    } else if (modified) {
      visit(ForwardShape<Type, kHead, false, true>{});
    } else {
      visit(ForwardShape<Type, kHead, false, false>{});
    }
  };
  const auto by_type = [&](auto head) {
    if (p.q.dtype == kFloat32) {
      visit(Float32Shape<decltype(head)::kValue>{});
    } else if (p.q.dtype == kBFloat16) {
      by_rows(ptx::BFloat16Tag{}, head);
    } else {
      by_rows(ptx::Float16Tag{}, head);
    }
  };
  const int64_t size = p.H > p.Hv ? p.H : p.Hv;
  if (size <= 64) {
    by_type(Number<64>{});
  } else if (size <= 128) {
    by_type(Number<128>{});
  } else {
    by_type(Number<256>{});
  }
}

// The fewest parts whose blocks fill the device almost as well as the best number does.
int64_t choose_splits(const AttentionProblem& p, int64_t blocks, int64_t block_keys) {
  const int64_t resident = kBlocksPerMultiprocessor * num_multiprocessors();
  if (blocks == 0 || blocks * 5 >= resident * 4) return 1;
  const int64_t sequences = p.cu_seqlens_k != nullptr && p.B > 0 ? p.B : 1;
  int64_t keys = p.S / sequences;
  if (p.left != kUnbounded && p.right != kUnbounded) keys = smaller(keys, (p.left + p.right) / p.step + 1);
  const int64_t most = smaller(kMostSplits, keys / (block_keys * kLeastBlocksPerSplit));
  const auto efficiency = [&](int64_t splits) {
    const int64_t waves = (blocks * splits + resident - 1) / resident;
    return static_cast<double>(blocks * splits) / static_cast<double>(waves * resident);
  };
  double best = 0.0;
  for (int64_t splits = 1; splits <= most; ++splits)
    best = best < efficiency(splits) ? efficiency(splits) : best;
  for (int64_t splits = 1; splits <= most; ++splits) {
    if (efficiency(splits) >= 0.85 * best) return splits;
  }
  return 1;
}

// What the kernel is launched with, but for its memory.
template <class Shape>
ForwardSchedule make_schedule(const AttentionProblem& p, int64_t& blocks) {
  const bool varlen = p.cu_seqlens_q != nullptr;
  const int64_t group = p.N / p.G;
  ForwardSchedule schedule{};
  schedule.blocks_per_head = static_cast<int>(blocks_per_head(varlen, p.B, p.T, group, Shape::kRows));
  blocks = num_blocks(varlen, p.B, p.G, p.T, group, Shape::kRows);
  schedule.num_splits = static_cast<int>(choose_splits(p, blocks, Shape::kKeys));
  schedule.num_rows = (varlen ? 1 : p.B) * p.N * p.T;
  blocks *= schedule.num_splits;
  if (blocks >= int64_t{1} << 31) refuse(std::to_string(blocks) + " thread blocks are too many");
  return schedule;
}

template <class Type, int kHead, bool kFew, bool kModified>
auto kernel_of(ForwardShape<Type, kHead, kFew, kModified>) {
  return &attention_forward_kernel<ForwardShape<Type, kHead, kFew, kModified>>;
}
template <int kHead>
auto kernel_of(Float32Shape<kHead>) {
  return &attention_forward_fp32_kernel<Float32Shape<kHead>>;
}

}  // namespace

int64_t attention_forward_memory(const AttentionProblem& p) {
  check_problem(p);
  int64_t bytes = 0;
  with_shape(p, [&](auto shape) {
    int64_t blocks = 0;
    const ForwardSchedule schedule = make_schedule<decltype(shape)>(p, blocks);
    if (schedule.num_splits > 1)
      bytes = schedule.num_splits * schedule.num_rows * (p.Hv + 1) * static_cast<int64_t>(sizeof(float));
  });
  return bytes;
}

void attention_forward(const AttentionForward& a) {
  const AttentionProblem& p = a.problem;
  check_problem(p);
  check_tensor("q", p.q);
  check_tensor("k", p.k);
  check_tensor("v", p.v);
  check_tensor("out", a.out);
  if (p.B == 0 || p.T == 0 || p.N == 0) return;
  with_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    int64_t blocks = 0;
    ForwardSchedule schedule = make_schedule<Shape>(p, blocks);
    schedule.partial_out = static_cast<float*>(a.memory);
    schedule.partial_lse = schedule.partial_out + schedule.num_splits * schedule.num_rows * p.Hv;
    launch(kernel_of(shape), dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), Shape::kSharedBytes,
           p.stream, a, schedule);
    if (schedule.num_splits == 1) return;
    const int64_t combine_blocks = (schedule.num_rows * kWarp + kCombineThreads - 1) / kCombineThreads;
    launch(&attention_combine_kernel, dim3(static_cast<unsigned>(combine_blocks)), dim3(kCombineThreads), 0,
           p.stream, a, schedule);
  });
}

std::vector<std::tuple<std::string, int, int>> attention_forward_kernels() {
  std::vector<std::tuple<std::string, int, int>> kernels{{"attention_combine_kernel", kCombineThreads, 0}};
  const auto add = [&](auto shape) {
    using Shape = decltype(shape);
    const std::string name = typeid(Shape).name();  // pypar::cuda::...
    kernels.emplace_back(name.substr(name.find("cuda") + 4), Shape::kThreads, Shape::kSharedBytes);
  };
  for (const int64_t head : {64, 128, 256}) {
    for (const int64_t length : {1, 128}) {
      for (const float softcap : {0.0f, 1.0f}) {
        for (const int dtype : {kFloat32, kBFloat16, kFloat16}) {
          AttentionProblem p{};
          p.B = p.N = p.G = 1, p.T = length, p.H = p.Hv = head, p.scale = 1.0f, p.softcap = softcap;
          p.q.dtype = dtype;
          // With few rows there is one kernel for all scores, in fp32 one for everything.
          if (length > 1 ? dtype != kFloat32 || softcap == 0.0f : dtype != kFloat32 && softcap == 0.0f) {
            with_shape(p, add);
          }
        }
      }
    }
  }
  return kernels;
}

}  // namespace pypar::cuda

#else  // PYPAR_BINDING

#  include <pybind11/stl.h>

#  include "attention/binding.h"

PYPAR_BIND(attention_forward) {
  pypar::bind_attention_forward(
      module, [](const pypar::AttentionProblem&) {}, &pypar::cuda::attention_forward_memory,
      [](const pypar::AttentionForward& arguments) {
        py::gil_scoped_release unlocked;
        pypar::cuda::attention_forward(arguments);
      });
  module.def("attention_forward_kernels", &pypar::cuda::attention_forward_kernels);
}

#endif
