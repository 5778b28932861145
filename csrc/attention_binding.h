// From Python's tuples to attention's arguments.
#pragma once

#include "attention.h"

namespace py = pybind11;

namespace pypar {

// (B, T, S, N, G, H, Hv, causal, num_threads)
inline AttentionSizes attention_sizes(const py::tuple& t, double scale) {
  if (t.size() != 9) throw py::value_error("sizes must be (B, T, S, N, G, H, Hv, causal, num_threads)");
  AttentionSizes s{};
  int64_t* const fields[] = {&s.B, &s.T, &s.S, &s.N, &s.G, &s.H, &s.Hv};
  for (size_t i = 0; i < 7; ++i) *fields[i] = t[i].cast<int64_t>();
  s.causal = t[7].cast<bool>();
  s.num_threads = t[8].cast<int>();
  s.scale = static_cast<float>(scale);
  constexpr int64_t kMost = int64_t{1} << 31;
  const bool sound =
      s.B >= 0 && s.T >= 0 && s.S >= 0 && s.G > 0 && s.N > 0 && s.N % s.G == 0 && s.H > 0 && s.Hv > 0;
  if (!sound || s.T >= kMost || s.S >= kMost || s.H >= 1 << 20 || s.Hv >= 1 << 20) {
    throw py::value_error("attention's sizes must be positive, N a multiple of G, T and S below 2^31");
  }
  return s;
}

// (address, (batch, position, head, element) strides, dtype code)
inline AttentionTensor attention_tensor(const py::tuple& t) {
  const auto strides = t[1].cast<py::tuple>();
  if (strides.size() != 4) throw py::value_error("attention's tensors have 4 dimensions");
  return AttentionTensor{reinterpret_cast<void*>(t[0].cast<uintptr_t>()),
                         strides[0].cast<int64_t>(),
                         strides[1].cast<int64_t>(),
                         strides[2].cast<int64_t>(),
                         strides[3].cast<int64_t>(),
                         t[2].cast<int>()};
}

}  // namespace pypar
