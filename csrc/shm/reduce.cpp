// The sum (or product, least, greatest, ...) of what several ranks hold, neighbours first.
#include "shm/reduce.h"

#ifndef PYPAR_BINDING

#  include "core/simd.h"

namespace pypar::PYPAR_ISA {
namespace {

template <int kOp>
PYPAR_INLINE Float combine(Float a, Float b) {
  if (kOp == kShmProduct) return a * b;
  if (kOp == kShmMin) return select(a < b, a, b);
  if (kOp == kShmMax) return select(a > b, a, b);
  return a + b;
}

// 2^12 ranks on one host.
constexpr int kDepth = 12;

// Reduces num values, the i-th of which is get(i), as a binary counter carries: what waits in `stack` are
// results of 2^k neighbours, the larger ones first.
template <int kOp, class Get>
PYPAR_INLINE Float combine_neighbours(int num, const Get& get) {
  Float sum = get(0);
  if (num < 4) {
    for (int r = 1; r < num; ++r) sum = combine<kOp>(sum, get(r));
    return sum;
  }
  Float stack[kDepth];
  int depth = 0;
  for (int r = 0; r < num; ++r) {
    sum = get(r);
    for (int bits = r; bits & 1; bits >>= 1) sum = combine<kOp>(stack[--depth], sum);
    stack[depth++] = sum;
  }
  sum = stack[--depth];
  while (depth > 0) sum = combine<kOp>(stack[--depth], sum);
  return sum;
}

// Floating-point elements, in fp32.
template <class Element, int kOp>
void reduce_vectors(const ShmReduce& a) {
  const Float scale = broadcast(kOp == kShmAverage ? 1.0f / static_cast<float>(a.num_inputs) : 1.0f);
  auto* out = static_cast<Element*>(a.out);
  auto* copy = static_cast<Element*>(a.copy);
  const auto input = [&](int r) { return static_cast<const Element*>(a.inputs[r]); };
  int64_t i = 0;
  for (; i + kWidth <= a.count; i += kWidth) {
    Float sum = combine_neighbours<kOp>(
        a.num_inputs, [&](int r) __attribute__((always_inline)) { return load(input(r) + i); });
    if (kOp == kShmAverage) sum *= scale;
    store(out + i, sum);
    if (copy != nullptr) store(copy + i, sum);
  }
  if (const int64_t rest = a.count - i; rest > 0) {
    Float sum = combine_neighbours<kOp>(
        a.num_inputs, [&](int r) __attribute__((always_inline)) { return load_partial(input(r) + i, rest); });
    if (kOp == kShmAverage) sum *= scale;
    store_partial(out + i, sum, rest);
    if (copy != nullptr) store_partial(copy + i, sum, rest);
  }
}

template <class T, int kOp>
PYPAR_INLINE T combine_scalars(T a, T b) {
  switch (kOp) {
    case kShmProduct:
      return static_cast<T>(a * b);
    case kShmMin:
      return a < b ? a : b;
    case kShmMax:
      return a > b ? a : b;
    default:
      return static_cast<T>(a + b);
  }
}

template <class T, int kOp>
PYPAR_INLINE T combine_bits(T a, T b) {
  return static_cast<T>(kOp == kShmAnd ? a & b : kOp == kShmOr ? a | b : a ^ b);
}

// Everything else, a block at a time, so that the inner loops are vectors.
template <class T, class Combine>
void reduce_blocks(const ShmReduce& a, const Combine& combine_two, double scale) {
  constexpr int64_t kBlock = 256;
  T stack[kDepth][kBlock];
  for (int64_t first = 0; first < a.count; first += kBlock) {
    const int64_t count = smaller(kBlock, a.count - first);
    int depth = 0;
    const auto join = [&] {
      --depth;
      T* const sum = stack[depth - 1];
      for (int64_t i = 0; i < count; ++i) sum[i] = combine_two(sum[i], stack[depth][i]);
    };
    for (int r = 0; r < a.num_inputs; ++r) {
      const T* input = static_cast<const T*>(a.inputs[r]) + first;
      std::memcpy(stack[depth++], input, static_cast<size_t>(count) * sizeof(T));
      for (int bits = r; bits & 1; bits >>= 1) join();
    }
    while (depth > 1) join();
    T* const block = stack[0];
    if (scale != 1.0) {
      for (int64_t i = 0; i < count; ++i) block[i] = static_cast<T>(block[i] * scale);
    }
    std::memcpy(static_cast<T*>(a.out) + first, block, static_cast<size_t>(count) * sizeof(T));
    if (a.copy != nullptr) {
      std::memcpy(static_cast<T*>(a.copy) + first, block, static_cast<size_t>(count) * sizeof(T));
    }
  }
}

template <class Element>
void reduce_floats(const ShmReduce& a) {
  switch (a.op) {
    case kShmSum:
      return reduce_vectors<Element, kShmSum>(a);
    case kShmAverage:
      return reduce_vectors<Element, kShmAverage>(a);
    case kShmProduct:
      return reduce_vectors<Element, kShmProduct>(a);
    case kShmMin:
      return reduce_vectors<Element, kShmMin>(a);
    default:
      return reduce_vectors<Element, kShmMax>(a);
  }
}

template <class T>
void reduce_numbers(const ShmReduce& a) {
  const double scale = a.op == kShmAverage ? 1.0 / a.num_inputs : 1.0;
  switch (a.op) {
    case kShmProduct:
      return reduce_blocks<T>(a, combine_scalars<T, kShmProduct>, 1.0);
    case kShmMin:
      return reduce_blocks<T>(a, combine_scalars<T, kShmMin>, 1.0);
    case kShmMax:
      return reduce_blocks<T>(a, combine_scalars<T, kShmMax>, 1.0);
    default:
      return reduce_blocks<T>(a, combine_scalars<T, kShmSum>, scale);
  }
}

template <class T>
void reduce_integers(const ShmReduce& a) {
  switch (a.op) {
    case kShmAnd:
      return reduce_blocks<T>(a, combine_bits<T, kShmAnd>, 1.0);
    case kShmOr:
      return reduce_blocks<T>(a, combine_bits<T, kShmOr>, 1.0);
    case kShmXor:
      return reduce_blocks<T>(a, combine_bits<T, kShmXor>, 1.0);
    default:
      return reduce_numbers<T>(a);
  }
}

}  // namespace

void shm_reduce(const ShmReduce& a) {
  switch (a.type) {
    case kShmFloat32:
      return reduce_floats<float>(a);
    case kShmBFloat16:
      return reduce_floats<BFloat16>(a);
    case kShmFloat16:
      return reduce_floats<Float16>(a);
    case kShmFloat64:
      return reduce_numbers<double>(a);
    case kShmUInt8:
      return reduce_integers<uint8_t>(a);
    case kShmInt8:
      return reduce_integers<int8_t>(a);
    case kShmInt16:
      return reduce_integers<int16_t>(a);
    case kShmInt32:
      return reduce_integers<int32_t>(a);
    case kShmInt64:
      return reduce_integers<int64_t>(a);
    default: {  // bool: a sum is true where any is, a product where all are
      ShmReduce bits = a;
      const bool all = a.op == kShmProduct || a.op == kShmMin || a.op == kShmAnd;
      bits.op = all ? kShmAnd : a.op == kShmXor ? kShmXor : kShmOr;
      return reduce_integers<uint8_t>(bits);
    }
  }
}

}  // namespace pypar::PYPAR_ISA

#endif
