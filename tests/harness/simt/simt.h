// The language of CUDA kernels for a host compiler. Force-included (-include) into csrc/*.cu when they are
// compiled with -DPYPAR_SIMT: kernels then run on a CPU, one fiber a thread, by the machine in machine.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// All of a module's shared variables lie in its thread-local block, whose bounds shared_bounds.cpp marks: so
// they are found, templates' ones too, and poisoned before each block. AddressSanitizer watches only ordinary
// variables.
#ifdef SIMT_SANITIZED
#  define __shared__ static
#else
#  define __shared__ static thread_local
#endif
#define PYPAR_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SIMT_VECTORS(name, type)                                   \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct name##3 { type x, y, z; };                                \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

#define SIMT_NO_THREE(name, type)                                  \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

SIMT_NO_THREE(uint, unsigned)
SIMT_VECTORS(int, int)
SIMT_VECTORS(float, float)
SIMT_VECTORS(ushort, unsigned short)
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
#undef SIMT_VECTORS
#undef SIMT_NO_THREE

namespace simt {

// Of the running thread. They do not change while it runs: hence `const`.
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
dim3 block_size() __attribute__((const));
dim3 grid_size() __attribute__((const));
unsigned char* dynamic_shared() __attribute__((const));
uint32_t shared_address(const void* pointer);

// Operations of a warp. A value is passed and returned in registers, so that nothing of a kernel's own state
// has its address taken: the compiler would then have every access to it checked.
enum class Shuffle : uint8_t { kIndex, kUp, kDown, kXor };
enum class Vote : uint8_t { kAny, kAll, kBallot };
enum class Reduce : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint64_t shuffle(unsigned mask, Shuffle mode, uint64_t value, int operand, int width);
unsigned vote(unsigned mask, Vote kind, bool predicate);
unsigned reduce(unsigned mask, Reduce kind, unsigned value, bool is_signed);
unsigned active_mask();
void sync_warp(unsigned mask);
enum class Barrier : uint8_t { kPlain, kCount, kAnd, kOr };
int sync_threads(Barrier kind, int predicate);
[[noreturn]] void trap();
// Checks an atomic access, and lets other threads run, of which one may be waited for.
void atomic_access(const void* address, size_t bytes);

// Words between devices, and a clock, which runs while threads wait.
void store_system(uint32_t* word, uint32_t value, bool release);
uint32_t load_system(const uint32_t* word, bool acquire);
uint64_t time_ns();

struct Words4 {
  uint32_t x, y, z, w;
};
struct Floats4 {
  float x, y, z, w;
};
enum class Element : uint8_t { kBFloat16, kFloat16 };
Words4 load_matrix(const void* row, int count, bool transposed);
Floats4 mma_bf16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                 float c1, float c2, float c3);
Floats4 mma_f16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                float c1, float c2, float c3);

// The instructions behind csrc/core/ptx.h.
void copy_async_16(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int groups);
float exp2_approx(float x);
float log2_approx(float x);
uint32_t pack_bf16(float lo, float hi);
uint32_t pack_f16(float lo, float hi);
float unpack_f16(uint16_t bits);

__forceinline__ void load_matrix_x1(uint32_t (&r)[1], const void* row) {
  r[0] = load_matrix(row, 1, false).x;
}
__forceinline__ void load_matrix_trans_x1(uint32_t (&r)[1], const void* row) {
  r[0] = load_matrix(row, 1, true).x;
}
__forceinline__ void store_words(uint32_t (&r)[2], const Words4& words) { r[0] = words.x, r[1] = words.y; }
__forceinline__ void store_words(uint32_t (&r)[4], const Words4& words) {
  r[0] = words.x, r[1] = words.y, r[2] = words.z, r[3] = words.w;
}
__forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  store_words(r, load_matrix(row, 2, false));
}
__forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  store_words(r, load_matrix(row, 4, false));
}
__forceinline__ void load_matrix_trans_x2(uint32_t (&r)[2], const void* row) {
  store_words(r, load_matrix(row, 2, true));
}
__forceinline__ void load_matrix_trans_x4(uint32_t (&r)[4], const void* row) {
  store_words(r, load_matrix(row, 4, true));
}
__forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                       const float (&c)[4]) {
  const Floats4 r = mma_bf16(a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
  d[0] = r.x, d[1] = r.y, d[2] = r.z, d[3] = r.w;
}
__forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const float (&c)[4]) {
  const Floats4 r = mma_f16(a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
  d[0] = r.x, d[1] = r.y, d[2] = r.z, d[3] = r.w;
}

// A launch waiting for its turn: the kernel and its arguments, which its threads may read.
struct Call {
  virtual ~Call() = default;
  virtual void run() const = 0;
  const void* kernel = nullptr;
  size_t bytes = 0;
  dim3 grid, block;
  size_t shared_bytes = 0;
};

template <class... Parameters>
struct KernelCall final : Call {
  template <class... Arguments>
  explicit KernelCall(void (*kernel_)(Parameters...), Arguments&&... values)
      : function(kernel_), arguments(static_cast<Arguments&&>(values)...) {
    kernel = reinterpret_cast<const void*>(kernel_);
    bytes = sizeof(*this);
  }
  void run() const override { std::apply(function, arguments); }

  void (*function)(Parameters...);
  std::tuple<std::remove_cv_t<Parameters>...> arguments;
};

// Runs the call at once if stream is null, after all that other streams hold; else it waits for a
// synchronisation. With Options::concurrent streams are devices whose kernels then run at the same time.
void submit(Call* call, void* stream);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
  auto* call = new KernelCall<Parameters...>(kernel, static_cast<Arguments&&>(arguments)...);
  call->grid = grid;
  call->block = block;
  call->shared_bytes = shared_bytes;
  submit(call, stream);
}

template <class T>
__forceinline__ uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "32 or 64 bits");
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  } else {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    return bits;
  }
}

template <class T>
__forceinline__ T from_bits(uint64_t bits) {
  T value;
  if constexpr (sizeof(T) == 4) {
    const auto low = static_cast<uint32_t>(bits);
    std::memcpy(&value, &low, 4);
  } else {
    std::memcpy(&value, &bits, 8);
  }
  return value;
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

__forceinline__ void __syncthreads() { simt::sync_threads(simt::Barrier::kPlain, 0); }
__forceinline__ int __syncthreads_count(int p) { return simt::sync_threads(simt::Barrier::kCount, p); }
__forceinline__ int __syncthreads_and(int p) { return simt::sync_threads(simt::Barrier::kAnd, p); }
__forceinline__ int __syncthreads_or(int p) { return simt::sync_threads(simt::Barrier::kOr, p); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
// Fences order nothing that the machine could reorder, and are no barrier.
__forceinline__ void __threadfence() {}
__forceinline__ void __threadfence_block() {}
__forceinline__ void __trap() { simt::trap(); }
__forceinline__ unsigned __activemask() { return simt::active_mask(); }
__forceinline__ int __any_sync(unsigned mask, int p) { return simt::vote(mask, simt::Vote::kAny, p != 0); }
__forceinline__ int __all_sync(unsigned mask, int p) { return simt::vote(mask, simt::Vote::kAll, p != 0); }
__forceinline__ unsigned __ballot_sync(unsigned mask, int p) {
  return simt::vote(mask, simt::Vote::kBallot, p != 0);
}

#define SIMT_SHUFFLE(name, mode)                                                         \
  template <class T>                                                                     \
  __forceinline__ T name(unsigned mask, T value, int operand, int width = 32) {          \
    return simt::from_bits<T>(                                                           \
        simt::shuffle(mask, simt::Shuffle::mode, simt::to_bits(value), operand, width)); \
  }
SIMT_SHUFFLE(__shfl_sync, kIndex)
SIMT_SHUFFLE(__shfl_up_sync, kUp)
SIMT_SHUFFLE(__shfl_down_sync, kDown)
SIMT_SHUFFLE(__shfl_xor_sync, kXor)
#undef SIMT_SHUFFLE

#define SIMT_REDUCE(name, kind)                                                                          \
  __forceinline__ unsigned name(unsigned mask, unsigned value) {                                         \
    return simt::reduce(mask, simt::Reduce::kind, value, false);                                         \
  }                                                                                                      \
  __forceinline__ int name(unsigned mask, int value) {                                                   \
    return static_cast<int>(simt::reduce(mask, simt::Reduce::kind, static_cast<unsigned>(value), true)); \
  }
SIMT_REDUCE(__reduce_add_sync, kAdd)
SIMT_REDUCE(__reduce_min_sync, kMin)
SIMT_REDUCE(__reduce_max_sync, kMax)
SIMT_REDUCE(__reduce_and_sync, kAnd)
SIMT_REDUCE(__reduce_or_sync, kOr)
SIMT_REDUCE(__reduce_xor_sync, kXor)
#undef SIMT_REDUCE

// Atomics: one thread runs at a time, so a plain update is atomic. The update itself must not be seen as a
// plain access: it is made through a volatile copy of the bits by a function without checks.
#define SIMT_ATOMIC(name, expression)                                                    \
  template <class T>                                                                     \
  __attribute__((no_sanitize("thread"), noinline)) T simt_update_##name(T* p, T value) { \
    const T old = *p;                                                                    \
    *p = (expression);                                                                   \
    return old;                                                                          \
  }                                                                                      \
  template <class T, class V>                                                            \
  __forceinline__ T name(T* p, V value) {                                                \
    simt::atomic_access(p, sizeof(T));                                                   \
    return simt_update_##name(p, static_cast<T>(value));                                 \
  }
SIMT_ATOMIC(atomicAdd, static_cast<T>(old + value))
SIMT_ATOMIC(atomicSub, static_cast<T>(old - value))
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, value > old ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
SIMT_ATOMIC(atomicDec, old == 0 || old > value ? value : T(old - 1))
#undef SIMT_ATOMIC
template <class T>
__attribute__((no_sanitize("thread"), noinline)) T simt_update_atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}
template <class T, class E, class V>
__forceinline__ T atomicCAS(T* p, E expected, V value) {
  simt::atomic_access(p, sizeof(T));
  return simt_update_atomicCAS(p, static_cast<T>(expected), static_cast<T>(value));
}

#define SIMT_MIN_MAX(type)                                           \
  __forceinline__ type min(type a, type b) { return b < a ? b : a; } \
  __forceinline__ type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__forceinline__ double min(double a, double b) { return fmin(a, b); }
__forceinline__ double max(double a, double b) { return fmax(a, b); }

__forceinline__ unsigned __float_as_uint(float x) { return simt::to_bits(x); }
__forceinline__ int __float_as_int(float x) { return static_cast<int>(simt::to_bits(x)); }
__forceinline__ float __uint_as_float(unsigned x) { return simt::from_bits<float>(x); }
__forceinline__ float __int_as_float(int x) { return simt::from_bits<float>(static_cast<unsigned>(x)); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t{a} * b) >> 32; }
__forceinline__ int __mulhi(int a, int b) { return static_cast<int>((int64_t{a} * b) >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= ((x >> i) & 1u) << (31 - i);
  return y;
}
__forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float a) { return 1.0f / a; }
template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
// glibc has functions of these names for itself.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __tanhf(x) tanhf(x)

// The part of the CUDA runtime that a launcher may need: streams are queues (stream.cpp).
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};
using cudaStream_t = struct SimtStream*;
using cudaEvent_t = struct SimtEvent*;
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid value";
}
