// Attention, backward, for sm_80 and later (Dao et al., arXiv 2205.14135): three kernels, one after the
// other.
//   1. per query: lse in the kernels' unit, and delta = sum(dout * out) - dlse
//   2. dk, dv: a block owns keys of one key/value head and streams all queries that see them, of all heads of
//   its group
//   3. dq, dbias: a block owns queries and streams the keys that they see
// Scores and dP are made twice, 7 products where 5 would do. In return no two blocks add to the same element:
// no atomics, no order to wait for, no memory beyond kernel 1's, and the result is bitwise the same in every
// run.
#include <string>
#include <tuple>
#include <vector>

#include "attention/arguments.h"

namespace pypar::cuda {
// Of every kernel: a part of its name in the machine code, threads and bytes of dynamic shared memory of a
// block.
std::vector<std::tuple<std::string, int, int>> attention_backward_kernels();
int64_t attention_backward_memory(const AttentionProblem& problem);
void attention_backward(const AttentionBackward& arguments);
}  // namespace pypar::cuda

#ifndef PYPAR_BINDING

#  include <stdexcept>
#  include <typeinfo>

#  include "attention/cuda/backward_kernel.cuh"

namespace pypar::cuda {

// Eight elements, from a 16-byte aligned place.
__device__ __forceinline__ void load_eight(float (&x)[8], const AttentionTensor& t, int64_t element) {
  if (t.dtype == kFloat32) {
    const float4* const from = reinterpret_cast<const float4*>(static_cast<const float*>(t.data) + element);
    const float4 first = from[0], second = from[1];
    x[0] = first.x, x[1] = first.y, x[2] = first.z, x[3] = first.w;
    x[4] = second.x, x[5] = second.y, x[6] = second.z, x[7] = second.w;
    return;
  }
  const uint4 packed = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(t.data) + element);
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#  pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint16_t bits = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
    x[i] = t.dtype == kBFloat16 ? ptx::unpack_bf16(bits) : ptx::unpack_f16(bits);
  }
}

constexpr int kValuesThreads = 256;

// A block makes kPaddedQueries queries' lse and delta, padding included; `lanes` (8, 16 or 32) threads a
// query, 8 elements each.
static __global__ void __launch_bounds__(kValuesThreads)
    attention_backward_values_kernel(const BackwardArguments a, int lanes, float score_unit) {
  const AttentionProblem& p = a.call.problem;
  const BlockPlace place = locate(p.cu_seqlens_q, static_cast<int>(p.B), static_cast<int>(p.N), 1,
                                  kPaddedQueries, a.per_head, blockIdx.x, false);
  if (!place.exists) return;
  const Sequence sequence = sequence_of(p, place.sequence);
  const int64_t to = values_index(a, place.sequence, place.head, first_value(a, sequence, place.sequence));
  const int thread = static_cast<int>(threadIdx.x), column = thread % lanes * 8;
  for (int row = thread / lanes; row < kPaddedQueries; row += kValuesThreads / lanes) {
    const int t = place.block * kPaddedQueries + row;
    float sum = 0.0f;
    if (t < sequence.T && column < p.Hv) {
      const auto element = [&](const AttentionTensor& from) {
        return place.sequence * from.batch_stride + (sequence.first_query + t) * from.position_stride +
               place.head * from.head_stride + column;
      };
      float dout[8], out[8];
      load_eight(dout, a.call.dout, element(a.call.dout));
      load_eight(out, a.call.out, element(a.call.out));
#  pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(dout[i], out[i], sum);
    }
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (column != 0) continue;
    float lse = minus_infinity();
    if (t < sequence.T) {
      const int64_t index = row_index(p, sequence, place.sequence, place.head, t);
      lse = a.call.lse[index];
      if (a.call.dlse != nullptr) sum -= a.call.dlse[index];
    }
    a.lse[to + t] = lse == minus_infinity() ? kNothingSeen : lse * score_unit;
    a.delta[to + t] = sum;
  }
}

[[noreturn]] static void refuse(const std::string& what) {
  throw std::invalid_argument("attention's backward on the GPU: " + what);
}

static void check_sizes(const AttentionProblem& p) {
  for (const int64_t size : {p.H, p.Hv}) {
    if (size % 8 != 0 || size > 256) {
      refuse("head size " + std::to_string(size) + " is not a multiple of 8 up to 256");
    }
  }
  if (p.T >= kFar || p.S >= kFar) refuse("2^30 positions are too many");
  if (p.B >= kFar / kPaddedQueries) refuse("2^24 sequences are too many");
}

static int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static int64_t padded_length(const AttentionProblem& p) {
  const int64_t length = rounded_up(p.T, kPaddedQueries);
  return p.cu_seqlens_q != nullptr ? length + p.B * kPaddedQueries : length;
}

static int64_t num_values(const AttentionProblem& p) {
  return padded_length(p) * p.N * (p.cu_seqlens_q != nullptr ? 1 : p.B);
}

int64_t attention_backward_memory(const AttentionProblem& p) {
  check_sizes(p);
  return num_values(p) * 2 * static_cast<int64_t>(sizeof(float));
}

static void check_tensor(const char* name, const AttentionTensor& t, int64_t bytes_aligned, int dtype) {
  const int64_t element = t.dtype == kFloat32 ? 4 : 2;
  if (t.dtype != dtype) refuse(std::string(name) + " must have q's type; fp32 where it is added to");
  const bool aligned = reinterpret_cast<uintptr_t>(t.data) % bytes_aligned == 0 &&
                       t.batch_stride * element % bytes_aligned == 0 &&
                       t.position_stride * element % bytes_aligned == 0 &&
                       t.head_stride * element % bytes_aligned == 0;
  if (t.element_stride != 1 || !aligned) {
    refuse(std::string(name) + " needs element stride 1 and rows aligned to " +
           std::to_string(bytes_aligned) + " bytes");
  }
}

static void check_backward(const AttentionBackward& a) {
  const AttentionProblem& p = a.problem;
  check_sizes(p);
  check_tensor("q", p.q, 16, p.q.dtype);
  check_tensor("k", p.k, 16, p.q.dtype);
  check_tensor("v", p.v, 16, p.q.dtype);
  check_tensor("dout", a.dout, 16, p.q.dtype);
  check_tensor("out", a.out, 16, a.out.dtype);
  const int sums = a.accumulate ? static_cast<int>(kFloat32) : p.q.dtype;
  check_tensor("dq", a.dq, a.dq.dtype == kFloat32 ? 8 : 4, sums);
  check_tensor("dk", a.dk, a.dk.dtype == kFloat32 ? 8 : 4, sums);
  check_tensor("dv", a.dv, a.dv.dtype == kFloat32 ? 8 : 4, sums);
}

static unsigned grid_size(int64_t blocks) {
  if (blocks >= int64_t{1} << 31) refuse("more than 2^31 thread blocks");
  return static_cast<unsigned>(blocks);
}

template <class Tag, int kSize, bool kKeys>
static void launch_pass(BackwardArguments a) {
  using Sizes = BackwardSizes<Tag, kSize>;
  const AttentionProblem& p = a.call.problem;
  const bool varlen = p.cu_seqlens_q != nullptr;
  const int64_t heads = kKeys ? p.G : p.N, length = kKeys ? p.S : p.T;
  a.per_head = static_cast<int>(blocks_per_head(varlen, p.B, length, 1, Sizes::kRows));
  const int64_t blocks =
      num_blocks(varlen, p.B, heads, length, 1, Sizes::kRows) * (kKeys && Sizes::kSplit ? 2 : 1);
  launch(attention_backward_kernel<Tag, kSize, kKeys>, dim3(grid_size(blocks)), dim3(Sizes::kThreads),
         BackwardMemory<Tag, kSize>::kBytes, p.stream, a);
}

template <class Tag>
static void launch_passes(const BackwardArguments& a) {
  const AttentionProblem& p = a.call.problem;
  const int64_t size = p.H > p.Hv ? p.H : p.Hv;
  if (size <= 64) {
    launch_pass<Tag, 64, true>(a);
    launch_pass<Tag, 64, false>(a);
  } else if (size <= 128) {
    launch_pass<Tag, 128, true>(a);
    launch_pass<Tag, 128, false>(a);
  } else {
    launch_pass<Tag, 256, true>(a);
    launch_pass<Tag, 256, false>(a);
  }
}

void attention_backward(const AttentionBackward& call) {
  const AttentionProblem& p = call.problem;
  check_backward(call);
  if (p.B == 0 || p.N == 0) return;
  BackwardArguments a{};
  a.call = call;
  a.lse = static_cast<float*>(call.memory);
  a.delta = a.lse + num_values(p);
  a.padded_length = padded_length(p);
  a.values_batch_stride = p.cu_seqlens_q != nullptr ? 0 : p.N * a.padded_length;
  a.group = static_cast<int>(p.N / p.G);
  a.inverse_softcap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
  a.kept_factor = 1.0f / (1.0f - p.dropout_p);
  a.modified = modifies_scores(p) || call.dbias != nullptr;

  const bool varlen = p.cu_seqlens_q != nullptr;
  BackwardArguments values = a;
  values.per_head = static_cast<int>(blocks_per_head(varlen, p.B, p.T, 1, kPaddedQueries));
  const int lanes = p.Hv <= 64 ? 8 : p.Hv <= 128 ? 16 : 32;
  launch(attention_backward_values_kernel,
         dim3(grid_size(num_blocks(varlen, p.B, p.N, p.T, 1, kPaddedQueries))), dim3(kValuesThreads), 0,
         p.stream, values, lanes,
         p.q.dtype == kFloat32 ? kScoreUnit<Float32Tag> : kScoreUnit<ptx::BFloat16Tag>);
  if (p.q.dtype == kFloat32) {
    launch_passes<Float32Tag>(a);
  } else if (p.q.dtype == kBFloat16) {
    launch_passes<ptx::BFloat16Tag>(a);
  } else {
    launch_passes<ptx::Float16Tag>(a);
  }
}

template <class Tag, int kSize>
static void describe(std::vector<std::tuple<std::string, int, int>>& kernels) {
  const std::string sizes = typeid(BackwardSizes<Tag, kSize>).name();  // ...BackwardSizesI<Tag, kSize>EE
  const size_t start = sizes.find("BackwardSizes") + 13;
  const std::string name = "attention_backward_kernel" + sizes.substr(start, sizes.size() - start - 2);
  for (const char* keys : {"Lb1E", "Lb0E"}) {
    kernels.emplace_back(name + keys, BackwardSizes<Tag, kSize>::kThreads,
                         BackwardMemory<Tag, kSize>::kBytes);
  }
}

template <int kSize>
static void describe_types(std::vector<std::tuple<std::string, int, int>>& kernels) {
  describe<Float32Tag, kSize>(kernels);
  describe<ptx::BFloat16Tag, kSize>(kernels);
  describe<ptx::Float16Tag, kSize>(kernels);
}

std::vector<std::tuple<std::string, int, int>> attention_backward_kernels() {
  std::vector<std::tuple<std::string, int, int>> kernels{
      {"attention_backward_values_kernel", kValuesThreads, 0}};
  describe_types<64>(kernels);
  describe_types<128>(kernels);
  describe_types<256>(kernels);
  return kernels;
}

}  // namespace pypar::cuda

#else  // PYPAR_BINDING

#  include <pybind11/stl.h>

#  include "attention/binding.h"

PYPAR_BIND(attention_backward) {
  pypar::bind_attention_backward(
      module, [](const pypar::AttentionProblem&) {},
      [](const pypar::AttentionProblem& p, bool) { return pypar::cuda::attention_backward_memory(p); },
      [](const pypar::AttentionBackward& arguments) {
        py::gil_scoped_release unlocked;
        pypar::cuda::attention_backward(arguments);
      });
  module.def("attention_backward_kernels", &pypar::cuda::attention_backward_kernels);
}

#endif
