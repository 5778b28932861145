// From Python's dict and tuples to attention's arguments, for every module that has attention's kernels: the
// names and types are checked here, so that a kernel meets nothing that would make it crash.
#pragma once

#include <cmath>
#include <initializer_list>
#include <string>

#include "attention/arguments.h"

namespace py = pybind11;

namespace pypar {

// Positions and windows stay below this, so that sums and products of them do not overflow.
constexpr int64_t kMostPosition = int64_t{1} << 40;
constexpr int64_t kMostLength = (int64_t{1} << 31) - 1;
constexpr int64_t kMostHeadSize = (int64_t{1} << 20) - 1;

inline int64_t attention_integer(const py::handle& x, const std::string& name, int64_t least, int64_t most) {
  if (!PyLong_Check(x.ptr())) throw py::type_error(name + " must be an integer");
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(x.ptr(), &overflow);
  if (overflow != 0 || value < least || value > most) {
    throw py::value_error(name + " must be between " + std::to_string(least) + " and " +
                          std::to_string(most));
  }
  return value;
}

inline double attention_number(const py::handle& x, const std::string& name) {
  if (!PyFloat_Check(x.ptr()) && !PyLong_Check(x.ptr())) throw py::type_error(name + " must be a number");
  const double value = PyFloat_AsDouble(x.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw py::value_error(name + " must be finite");
  }
  // What fp32 cannot hold is infinite to a kernel.
  if (!std::isfinite(static_cast<float>(value))) throw py::value_error(name + " must be finite");
  return value;
}

template <class Pointer>
Pointer attention_address(const py::handle& x, const std::string& name) {
  return reinterpret_cast<Pointer>(attention_integer(x, name, 0, INT64_MAX));
}

inline py::tuple attention_tuple(const py::handle& x, const std::string& name, size_t size) {
  if (!PyTuple_Check(x.ptr())) throw py::type_error(name + " must be a tuple");
  auto tuple = py::reinterpret_borrow<py::tuple>(x);
  if (tuple.size() != size) throw py::value_error(name + " must have " + std::to_string(size) + " members");
  return tuple;
}

// (address, (batch, position, head, element) strides, dtype code). `count`: how many elements it has.
inline AttentionTensor attention_tensor(const py::handle& x, const std::string& name, int64_t count) {
  const py::tuple t = attention_tuple(x, name, 3);
  const py::tuple strides = attention_tuple(t[1], name + "'s strides", 4);
  AttentionTensor tensor{};
  tensor.data = attention_address<void*>(t[0], name + "'s address");
  int64_t* const fields[] = {&tensor.batch_stride, &tensor.position_stride, &tensor.head_stride,
                             &tensor.element_stride};
  for (size_t i = 0; i < 4; ++i) {
    *fields[i] = attention_integer(strides[i], name + "'s strides", -kMostPosition, kMostPosition);
  }
  tensor.dtype = static_cast<int>(attention_integer(t[2], name + "'s dtype code", kFloat32, kFloat16));
  if (count > 0 && tensor.data == nullptr) throw py::value_error(name + " has elements but no address");
  return tensor;
}

inline AttentionTensor attention_tensor_of(const py::handle& x, const std::string& name, int64_t count,
                                           std::initializer_list<int> dtypes) {
  const AttentionTensor tensor = attention_tensor(x, name, count);
  for (int dtype : dtypes) {
    if (tensor.dtype == dtype) return tensor;
  }
  throw py::value_error(name + " has dtype code " + std::to_string(tensor.dtype) +
                        ", which does not fit q's");
}

inline py::object attention_field(const py::dict& problem, const char* name) {
  if (!problem.contains(name)) throw py::value_error(std::string("the problem lacks ") + name);
  return problem[name];
}

inline void attention_sizes(const py::dict& dict, AttentionProblem* p) {
  const auto size = [&](const char* name, int64_t least, int64_t most) {
    return attention_integer(attention_field(dict, name), name, least, most);
  };
  p->B = size("B", 0, kMostLength);
  p->T = size("T", 0, kMostLength);
  p->S = size("S", 0, kMostLength);
  p->N = size("N", 1, kMostLength);
  p->G = size("G", 1, kMostLength);
  p->H = size("H", 1, kMostHeadSize);
  p->Hv = size("Hv", 1, kMostHeadSize);
  if (p->N % p->G != 0) {
    throw py::value_error("N (" + std::to_string(p->N) + ") must be a multiple of G (" +
                          std::to_string(p->G) + ")");
  }
  // Every count of elements and of bytes of memory is below 2^62.
  int64_t count = p->T > p->S ? p->T : p->S;
  count += 256;  // whole blocks
  for (int64_t factor : {p->B + 1, p->N, p->H + p->Hv + 64}) {
    if (__builtin_mul_overflow(count, factor, &count) || count > int64_t{1} << 57) {
      throw py::value_error("B * max(T, S) * N * (H + Hv) is too large");
    }
  }
  p->q = attention_tensor(attention_field(dict, "q"), "q", p->B * p->T);
  p->k = attention_tensor(attention_field(dict, "k"), "k", p->B * p->S);
  p->v = attention_tensor(attention_field(dict, "v"), "v", p->B * p->S);
  if (p->k.dtype != p->q.dtype || p->v.dtype != p->q.dtype) {
    throw py::value_error("q, k and v must have one dtype");
  }
}

inline void attention_mask(const py::dict& dict, AttentionProblem* p) {
  const auto size = [&](const char* name, int64_t least, int64_t most) {
    return attention_integer(attention_field(dict, name), name, least, most);
  };
  // What is larger than every distance of positions is no bound.
  p->left = size("left", kUnbounded, INT64_MAX);
  p->right = size("right", kUnbounded, INT64_MAX);
  if (p->left > 4 * kMostPosition) p->left = kUnbounded;
  if (p->right > 4 * kMostPosition) p->right = kUnbounded;
  p->bottom_right = size("bottom_right", 0, 1) != 0;
  p->q_start = size("q_start", -kMostPosition, kMostPosition);
  p->k_start = size("k_start", -kMostPosition, kMostPosition);
  p->step = size("step", 1, int64_t{1} << 20);
  p->batch_start = size("batch_start", 0, UINT32_MAX);
  p->head_start = size("head_start", 0, UINT32_MAX);
  const auto address = [&](const char* name) {
    return attention_address<const int32_t*>(attention_field(dict, name), name);
  };
  p->cu_seqlens_q = address("cu_seqlens_q");
  p->cu_seqlens_k = address("cu_seqlens_k");
  if ((p->cu_seqlens_q == nullptr) != (p->cu_seqlens_k == nullptr)) {
    throw py::value_error("cu_seqlens_q and cu_seqlens_k come together");
  }
}

inline void attention_score_options(const py::dict& dict, AttentionProblem* p) {
  const auto number = [&](const char* name) { return attention_number(attention_field(dict, name), name); };
  p->scale = static_cast<float>(number("scale"));
  p->softcap = static_cast<float>(number("softcap"));
  if (p->softcap < 0.0f) throw py::value_error("softcap must not be negative");
  const py::object bias = attention_field(dict, "bias");
  if (!bias.is_none()) {
    const py::tuple t = attention_tuple(bias, "bias", 3);
    const py::tuple strides = attention_tuple(t[1], "bias's strides", 4);
    p->bias.data = attention_address<const void*>(t[0], "bias's address");
    int64_t* const fields[] = {&p->bias.batch_stride, &p->bias.head_stride, &p->bias.query_stride,
                               &p->bias.key_stride};
    for (size_t i = 0; i < 4; ++i) {
      *fields[i] = attention_integer(strides[i], "bias's strides", -kMostPosition, kMostPosition);
    }
    p->bias.dtype = static_cast<int>(attention_integer(t[2], "bias's dtype code", kFloat32, kFloat16));
    if (p->bias.dtype != p->q.dtype && p->bias.dtype != kFloat32) {
      throw py::value_error("bias must have q's dtype or float32");
    }
    if (p->bias.data == nullptr && p->B * p->T > 0 && p->S > 0) {
      throw py::value_error("bias has elements but no address");
    }
    if (p->cu_seqlens_q) throw py::value_error("bias does not go with cu_seqlens");
  }
  p->sinks = attention_address<const float*>(attention_field(dict, "sinks"), "sinks");
  p->alibi_slopes = attention_address<const float*>(attention_field(dict, "alibi_slopes"), "alibi_slopes");
  p->alibi_batch_stride = attention_integer(attention_field(dict, "alibi_batch_stride"), "alibi_batch_stride",
                                            -kMostPosition, kMostPosition);
  const double dropout = number("dropout_p");
  p->dropout_p = static_cast<float>(dropout);
  if (dropout < 0.0 || p->dropout_p >= 1.0f) {
    throw py::value_error("dropout_p must be at least 0 and below 1");
  }
  p->dropout_threshold = static_cast<uint32_t>(
      attention_integer(attention_field(dict, "dropout_threshold"), "dropout_threshold", 0, UINT32_MAX));
  p->seed = attention_address<const int64_t*>(attention_field(dict, "seed"), "seed");
  if (p->dropout_p > 0.0f && p->seed == nullptr) throw py::value_error("dropout_p needs a seed");
}

inline AttentionProblem attention_problem(const py::dict& dict) {
  AttentionProblem problem{};
  attention_sizes(dict, &problem);
  attention_mask(dict, &problem);
  attention_score_options(dict, &problem);
  problem.num_threads =
      static_cast<int>(attention_integer(attention_field(dict, "num_threads"), "num_threads", 1, 1 << 16));
  problem.stream = attention_address<void*>(attention_field(dict, "stream"), "stream");
  return problem;
}

// For lengths in memory that this code can read.
inline void check_attention_lengths(const AttentionProblem& p) {
  const auto check = [&p](const int32_t* lengths, int64_t total, const std::string& name) {
    if (lengths == nullptr) return;
    if (lengths[0] != 0) throw py::value_error(name + " must begin with 0");
    for (int64_t b = 0; b < p.B; ++b) {
      if (lengths[b + 1] < lengths[b]) {
        throw py::value_error(name + " must not decrease, it does after entry " + std::to_string(b));
      }
    }
    if (lengths[p.B] > total) {
      throw py::value_error(name + " ends with " + std::to_string(lengths[p.B]) + ", there are only " +
                            std::to_string(total) + " positions");
    }
  };
  check(p.cu_seqlens_q, p.T, "cu_seqlens_q");
  check(p.cu_seqlens_k, p.S, "cu_seqlens_k");
}

inline AttentionForward attention_forward_arguments(const AttentionProblem& problem, const py::object& out,
                                                    const py::object& lse, const py::object& lse_rest,
                                                    bool carry, const py::object& memory) {
  AttentionForward a{};
  a.problem = problem;
  const int64_t count = problem.B * problem.T;
  a.out = carry ? attention_tensor_of(out, "out", count, {kFloat32})
                : attention_tensor_of(out, "out", count, {problem.q.dtype, kFloat32});
  a.lse = attention_address<float*>(lse, "lse's address");
  if (count > 0 && a.lse == nullptr) throw py::value_error("lse has elements but no address");
  a.lse_rest = attention_address<float*>(lse_rest, "lse_rest's address");
  a.carry = carry;
  a.memory = attention_address<void*>(memory, "memory's address");
  return a;
}

// The tensors and addresses in the order of the Python function.
inline AttentionBackward attention_backward_arguments(const AttentionProblem& problem,
                                                      const py::tuple& tensors, const py::tuple& addresses,
                                                      bool accumulate) {
  AttentionBackward a{};
  a.problem = problem;
  a.accumulate = accumulate;
  const int64_t queries = problem.B * problem.T, keys = problem.B * problem.S;
  const int dtype = problem.q.dtype, result = accumulate ? static_cast<int>(kFloat32) : dtype;
  a.dout = attention_tensor_of(tensors[0], "dout", queries, {dtype, kFloat32});
  a.out = attention_tensor_of(tensors[1], "out", queries, {dtype, kFloat32});
  a.dq = attention_tensor_of(tensors[2], "dq", queries, {result, kFloat32});
  a.dk = attention_tensor_of(tensors[3], "dk", keys, {result, kFloat32});
  a.dv = attention_tensor_of(tensors[4], "dv", keys, {result, kFloat32});
  a.lse = attention_address<const float*>(addresses[0], "lse's address");
  if (queries > 0 && a.lse == nullptr) throw py::value_error("lse has elements but no address");
  a.lse_rest = attention_address<const float*>(addresses[1], "lse_rest's address");
  a.dlse = attention_address<const float*>(addresses[2], "dlse's address");
  a.dbias = attention_address<float*>(addresses[3], "dbias's address");
  if (a.dbias && problem.cu_seqlens_q) throw py::value_error("dbias does not go with cu_seqlens");
  a.memory = attention_address<void*>(addresses[4], "memory's address");
  return a;
}

inline bool attention_memory_fits(const void* memory, int64_t bytes) {
  return bytes == 0 || (memory != nullptr && reinterpret_cast<uintptr_t>(memory) % 64 == 0);
}

// The four functions of a module. `forward_memory` and `backward_memory` return bytes; `check` throws what
// the kernels refuse.
template <class Check, class Memory, class Forward>
void bind_attention_forward(py::module_& module, Check check, Memory memory_bytes, Forward forward) {
  module.def("attention_forward_memory", [=](const py::dict& problem) {
    const AttentionProblem p = attention_problem(problem);
    check(p);
    return memory_bytes(p);
  });
  module.def("attention_forward", [=](const py::dict& problem, const py::object& out, const py::object& lse,
                                      const py::object& lse_rest, bool carry, const py::object& memory) {
    const AttentionProblem p = attention_problem(problem);
    check(p);
    const AttentionForward a = attention_forward_arguments(p, out, lse, lse_rest, carry, memory);
    if (!attention_memory_fits(a.memory, memory_bytes(p))) {
      throw py::value_error(
          "attention_forward needs the memory of attention_forward_memory, 64-byte aligned");
    }
    forward(a);
  });
}

template <class Check, class Memory, class Backward>
void bind_attention_backward(py::module_& module, Check check, Memory memory_bytes, Backward backward) {
  module.def(
      "attention_backward_memory",
      [=](const py::dict& problem, bool accumulate) {
        const AttentionProblem p = attention_problem(problem);
        check(p);
        return memory_bytes(p, accumulate);
      },
      py::arg("problem"), py::arg("accumulate") = false);
  module.def(
      "attention_backward",
      [=](const py::dict& problem, const py::object& dout, const py::object& out, const py::object& lse,
          const py::object& lse_rest, const py::object& dlse, const py::object& dq, const py::object& dk,
          const py::object& dv, bool accumulate, const py::object& dbias, const py::object& memory) {
        const AttentionProblem p = attention_problem(problem);
        check(p);
        const AttentionBackward a =
            attention_backward_arguments(p, py::make_tuple(dout, out, dq, dk, dv),
                                         py::make_tuple(lse, lse_rest, dlse, dbias, memory), accumulate);
        if (!attention_memory_fits(a.memory, memory_bytes(p, accumulate))) {
          throw py::value_error(
              "attention_backward needs the memory of attention_backward_memory, 64-byte aligned");
        }
        backward(a);
      });
}

}  // namespace pypar
