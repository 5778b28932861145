// The PTX instructions that the kernels use, behind named device functions: the only place with inline
// assembly.
//
// Under PYPAR_SIMT a kernel runs on the CPU, thread by thread, and each function calls its namesake of the
// host runtime (tests/harness/simt/simt.h). bfloat16 and float16 are 16 bits without arithmetic here: they
// are loaded, multiplied by the tensor cores, and made from float by the pack functions.
#pragma once

#include <cstdint>

namespace pypar::ptx {

// Which of the two 16-bit types a kernel works in.
struct BFloat16Tag {};
struct Float16Tag {};

#ifndef PYPAR_SIMT

// threadIdx.x, read anew each time: what is computed from it is not kept in registers over a long loop, as
// what is computed from threadIdx.x may be.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Where a pointer into shared memory points, as the instructions below want it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ldmatrix: loads 8x8 matrices of 16-bit elements, x1, x2 or x4 of them. Lane 8 i + r gives the address of
// row r of matrix i, 16 bytes that are 16-byte aligned; r[i] of lane l receives elements 2 (l % 4) and one
// more of row l / 4 of matrix i, the lower one in the lower half. The trans forms give the transposed matrix.
__device__ __forceinline__ void load_matrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_trans_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_trans_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_trans_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d = a b + c of a warp: a is 16x16, b 16x8, c and d 16x8 in fp32. With row = lane / 4 and column = 2 (lane %
// 4): a[0], a[1], a[2], a[3] are at (row, column), (row + 8, column), (row, column + 8), (row + 8, column +
// 8); b[0], b[1] at k = column, column + 8 of n = row; c[0], c[1] at (row, column), (row, column + 1), c[2],
// c[3] 8 rows below.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4], BFloat16Tag) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4], Float16Tag) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}

// Starts a copy of 16 bytes, both addresses 16-byte aligned, past L1; zeros, and nothing read, if not valid.
// The data may be read after copy_async_wait, and by other threads after a barrier that follows it.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Makes one group of this thread's copies since the last commit; it may be empty.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until all but this thread's N latest groups have arrived.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

// 2^x; error at most 2 units in the last place, a result below the normal range is 0, 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); log2(0) is -inf.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x; 1 / inf is 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats, rounded to nearest even, `lo` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

__device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// The value of a float16's bits.
__device__ __forceinline__ float unpack_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Words that GPUs of one node, and the host, pass to each other. What a thread did before a release, and what
// it knew of, is seen by whoever reads the stored value with acquire, and by all that is ordered behind that
// read, across barriers too. A relaxed access is whole and not held in a cache, and orders nothing.
__device__ __forceinline__ void store_release_system(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(word)), "r"(value)
               : "memory");
}

__device__ __forceinline__ void store_relaxed_system(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(word)), "r"(value)
               : "memory");
}

__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_relaxed_system(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return value;
}

// Nanoseconds since some moment; on some GPUs it advances about once in a microsecond.
__device__ __forceinline__ uint64_t time_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

#else  // PYPAR_SIMT

// Functions of their own, not using-declarations: code that is wrong under nvcc is then wrong here too.
inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline uint32_t shared_address(const void* pointer) { return simt::shared_address(pointer); }
inline void load_matrix_x1(uint32_t (&r)[1], const void* row) { simt::load_matrix_x1(r, row); }
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) { simt::load_matrix_x2(r, row); }
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { simt::load_matrix_x4(r, row); }
inline void load_matrix_trans_x1(uint32_t (&r)[1], const void* row) { simt::load_matrix_trans_x1(r, row); }
inline void load_matrix_trans_x2(uint32_t (&r)[2], const void* row) { simt::load_matrix_trans_x2(r, row); }
inline void load_matrix_trans_x4(uint32_t (&r)[4], const void* row) { simt::load_matrix_trans_x4(r, row); }
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                         BFloat16Tag) {
  simt::mma_m16n8k16_bf16(d, a, b, c);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                         Float16Tag) {
  simt::mma_m16n8k16_f16(d, a, b, c);
}
inline void copy_async_16(void* shared, const void* global, bool valid) {
  simt::copy_async_16(shared, global, valid);
}
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int N>
inline void copy_async_wait() {
  simt::copy_async_wait(N);
}
inline void store_release_system(uint32_t* word, uint32_t value) { simt::store_system(word, value, true); }
inline void store_relaxed_system(uint32_t* word, uint32_t value) { simt::store_system(word, value, false); }
inline uint32_t load_acquire_system(const uint32_t* word) { return simt::load_system(word, true); }
inline uint32_t load_relaxed_system(const uint32_t* word) { return simt::load_system(word, false); }
inline uint64_t time_ns() { return simt::time_ns(); }
inline float exp2_approx(float x) { return simt::exp2_approx(x); }
inline float log2_approx(float x) { return simt::log2_approx(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline uint32_t pack_bf16(float lo, float hi) { return simt::pack_bf16(lo, hi); }
inline uint32_t pack_f16(float lo, float hi) { return simt::pack_f16(lo, hi); }
inline float unpack_f16(uint16_t bits) { return simt::unpack_f16(bits); }

#endif  // PYPAR_SIMT

// tanh(x), by 2^x: error about 2e-7 of 1.
__device__ __forceinline__ float tanh_approx(float x) {
  constexpr float kTwoLog2E = 2.8853900817779268f;
  return 1.0f - 2.0f * reciprocal_approx(exp2_approx(x * kTwoLog2E) + 1.0f);
}

// The value of a bfloat16's bits.
__device__ __forceinline__ float unpack_bf16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// By the type's tag: the value of 16 bits; two floats rounded.
__device__ __forceinline__ float unpack(uint16_t bits, BFloat16Tag) { return unpack_bf16(bits); }
__device__ __forceinline__ float unpack(uint16_t bits, Float16Tag) { return unpack_f16(bits); }
__device__ __forceinline__ uint32_t pack(float lo, float hi, BFloat16Tag) { return pack_bf16(lo, hi); }
__device__ __forceinline__ uint32_t pack(float lo, float hi, Float16Tag) { return pack_f16(lo, hi); }

}  // namespace pypar::ptx
