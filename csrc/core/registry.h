// How the native module is put together.
//
// csrc/module.cpp is compiled once (-DPYPAR_BINDING). Every other .cpp file of csrc is compiled
//   - once per instruction set, without pybind11: -DPYPAR_ISA=<isa> and the flags of the table, and
//   - once with -DPYPAR_BINDING and no instruction set flags: the Python side.
//
//   all:     -std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math
//   x86-64:  baseline
//            avx2          -mavx2 -mfma -mf16c -mbmi -mbmi2
//            avx512        avx2's and -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
//            avx512_bf16   avx512's and -mavx512bf16
//            amx           avx512_bf16's and -mamx-tile -mamx-bf16; only sources that name __AMX_BF16__
//            amx_fp16      amx's and -DPYPAR_FP16_TILES; only sources that name PYPAR_FP16_TILES
//   aarch64: neon          (no flags)
//
// An op has one struct of plain arguments and, per instruction set, `void kernel(const Arguments&)`:
//
//   // csrc/scale.cpp
//   #include "core/registry.h"
//   namespace pypar {
//   struct ScaleArguments { float* x; int64_t count; float factor; int num_threads; };
//   PYPAR_KERNEL(scale, ScaleArguments)
//   }
//   #ifndef PYPAR_BINDING
//   #include "core/parallel.h"
//   #include "core/simd.h"
//   namespace pypar::PYPAR_ISA { void scale(const ScaleArguments& a) { ... } }
//   #else
//   PYPAR_BIND(scale) {
//     module.def("scale", [](uintptr_t x, int64_t count, float factor, int num_threads) {
//       pypar::launch<pypar::scale_kernels>(
//           pypar::ScaleArguments{reinterpret_cast<float*>(x), count, factor, num_threads});
//     });
//   }
//   #endif
//
// An instruction set may lack a kernel (its code under #ifdef __AVX512BF16__, say): the next lower one is
// taken. Code compiled for an instruction set must not reach another one's callers: everything stands in
// namespace pypar::PYPAR_ISA or is static, no std:: templates (std::min, std::vector), no static
// initialisers. tests/native/test_instruction_sets.py looks for such leaks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pypar {

// Lowest first. `isa_name` in module.cpp follows this order.
enum Isa { kBaseline, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxFp16, kNumIsas };

enum ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The instruction set in use: the best that the CPU has, until Python selects another.
Isa selected_isa();

// Runs body(data) on num_threads threads at once, the caller's among them, and returns when all have ended.
// The threads are those of torch's OpenMP pool (see module.cpp). An exception of a body is rethrown to the
// caller.
void run_on_threads(void (*body)(void*), void* data, int num_threads);

// Memory of the calling thread, 64-byte aligned, kept until the thread ends. What an earlier call returned
// on the same thread is invalid after the next call. Throws std::bad_alloc.
void* thread_scratch(size_t bytes);

// Sleeps for an instant, so that another thread can run.
void yield_thread();

}  // namespace pypar

#define PYPAR_WEAK __attribute__((weak, visibility("hidden")))

// Declares the kernel of every instruction set, null where it was not compiled, and their table for `launch`.
#define PYPAR_KERNEL(name, Arguments)          \
  namespace baseline {                         \
  PYPAR_WEAK void name(const Arguments&);      \
  }                                            \
  namespace neon {                             \
  PYPAR_WEAK void name(const Arguments&);      \
  }                                            \
  namespace avx2 {                             \
  PYPAR_WEAK void name(const Arguments&);      \
  }                                            \
  namespace avx512 {                           \
  PYPAR_WEAK void name(const Arguments&);      \
  }                                            \
  namespace avx512_bf16 {                      \
  PYPAR_WEAK void name(const Arguments&);      \
  }                                            \
  namespace amx {                              \
  PYPAR_WEAK void name(const Arguments&);      \
  }                                            \
  namespace amx_fp16 {                         \
  PYPAR_WEAK void name(const Arguments&);      \
  }                                            \
  struct name##_kernels {                      \
    using Kernel = void (*)(const Arguments&); \
    static Kernel of(int isa) {                \
      switch (isa) {                           \
        case kBaseline:                        \
          return &baseline::name;              \
        case kNeon:                            \
          return &neon::name;                  \
        case kAvx2:                            \
          return &avx2::name;                  \
        case kAvx512:                          \
          return &avx512::name;                \
        case kAvx512Bf16:                      \
          return &avx512_bf16::name;           \
        case kAmx:                             \
          return &amx::name;                   \
        case kAmxFp16:                         \
          return &amx_fp16::name;              \
        default:                               \
          return nullptr;                      \
      }                                        \
    }                                          \
  };

#ifdef PYPAR_BINDING

#  include <pybind11/pybind11.h>

#  include <stdexcept>

namespace pypar {

// One function that adds an op's names to the module; the objects form a list that module.cpp walks.
struct Binding {
  explicit Binding(void (*define)(pybind11::module_&));
  void (*define)(pybind11::module_&);
  Binding* next;
};

// Runs the selected instruction set's kernel, or the next lower one's, without the GIL.
template <class Kernels, class Arguments>
void launch(const Arguments& arguments) {
  for (int isa = selected_isa(); isa >= 0; --isa) {
    if (auto* kernel = Kernels::of(isa)) {
      pybind11::gil_scoped_release unlocked;
      kernel(arguments);
      return;
    }
  }
  throw std::runtime_error("this build of pypar._native has no kernel for the selected instruction set");
}

}  // namespace pypar

#  define PYPAR_BIND(op)                                  \
    static void bind_##op(pybind11::module_& module);     \
    static const pypar::Binding op##_binding(&bind_##op); \
    static void bind_##op(pybind11::module_& module)

#endif  // PYPAR_BINDING
