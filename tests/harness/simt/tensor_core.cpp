// ldmatrix, mma.sync.m16n8k16, cp.async and the other instructions behind csrc/core/ptx.h, after the PTX ISA
// manual.
#include <algorithm>
#include <cmath>

#include "memory.h"
#include "report.h"

namespace simt {

namespace {

using Row8 = float __attribute__((vector_size(32)));

float bfloat16_value(uint32_t bits) { return from_bits<float>(bits << 16); }

// Exact, by the multiplication that shifts the exponent.
float float16_value(uint32_t bits) {
  const float magnitude = from_bits<float>((bits & 0x7fffu) << 13) * from_bits<float>(0x77800000u);  // 2^112
  uint32_t result = static_cast<uint32_t>(to_bits(magnitude));
  if ((bits & 0x7c00u) == 0x7c00u) result = 0x7f800000u | (bits & 0x3ffu) << 13;
  return from_bits<float>(result | (bits & 0x8000u) << 16);
}

void unpack(Element element, uint32_t pair, float* to, size_t stride) {
  const bool bf16 = element == Element::kBFloat16;
  to[0] = bf16 ? bfloat16_value(pair & 0xffffu) : float16_value(pair & 0xffffu);
  to[stride] = bf16 ? bfloat16_value(pair >> 16) : float16_value(pair >> 16);
}

uint32_t round_bfloat16(float x) {
  const auto bits = static_cast<uint32_t>(to_bits(x));
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

uint32_t round_float16(float x) {
  const auto bits = static_cast<uint32_t>(to_bits(x));
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: a multiple of 2^-24, which is what adding 0.5 leaves of fp32's digits.
    const float shifted = from_bits<float>(magnitude) + 0.5f;
    return sign | (static_cast<uint32_t>(to_bits(shifted)) - 0x3f000000u);
  }
  return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

Floats4 mma(Element element, const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
            const void* site) {
  Thread& t = *current;
  std::copy_n(a, 4, t.in);
  std::copy_n(b, 2, t.in + 4);
  std::memcpy(t.in + 6, c, sizeof c);
  arrive(t, Operation::kMma, static_cast<uint8_t>(element), ~0u, site);
  Floats4 result;
  std::memcpy(&result, t.out, sizeof result);
  return result;
}

void land(Thread& t, const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
  mark_arrived(t, copy.shared, 16, copy.site);
}

}  // namespace

// Sums in fp32, from c on, over k in ascending order; the products are exact. The hardware's order is its
// own.
void finish_mma(Warp& warp) {
  ++machine.counters.mma;
  float a[16][16];
  Row8 b[16], d[16];
  float* const b_values = reinterpret_cast<float*>(b);
  float* const d_values = reinterpret_cast<float*>(d);
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const Thread& t = lane_of(warp, lane);
    const auto element = static_cast<Element>(t.wait.variant);
    const unsigned row = lane / 4, column = 2 * (lane % 4);
    unpack(element, t.in[0], &a[row][column], 1);
    unpack(element, t.in[1], &a[row + 8][column], 1);
    unpack(element, t.in[2], &a[row][column + 8], 1);
    unpack(element, t.in[3], &a[row + 8][column + 8], 1);
    unpack(element, t.in[4], b_values + column * 8 + row, 8);
    unpack(element, t.in[5], b_values + (column + 8) * 8 + row, 8);
    std::memcpy(d_values + row * 8 + column, t.in + 6, 8);
    std::memcpy(d_values + (row + 8) * 8 + column, t.in + 8, 8);
  }
  for (unsigned row = 0; row < 16; ++row) {
    Row8 sum = d[row];
    for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k];
    d[row] = sum;
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    Thread& t = lane_of(warp, lane);
    const unsigned row = lane / 4, column = 2 * (lane % 4);
    std::memcpy(t.out, d_values + row * 8 + column, 8);
    std::memcpy(t.out + 2, d_values + (row + 8) * 8 + column, 8);
  }
}

Floats4 mma_bf16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                 float c1, float c2, float c3) {
  return mma(Element::kBFloat16, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}, __builtin_return_address(0));
}

Floats4 mma_f16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                float c1, float c2, float c3) {
  return mma(Element::kFloat16, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}, __builtin_return_address(0));
}

// Lane 8 i + r gave the address of row r of matrix i. Each lane reads, for the checks, the elements that it
// receives.
void finish_load_matrix(Warp& warp) {
  ++machine.counters.load_matrix;
  const Wait wait = lane_of(warp, 0).wait;
  const unsigned count = wait.variant >> 1;
  const bool transposed = (wait.variant & 1) != 0;
  const char* rows[32];
  for (unsigned i = 0; i < 8 * count; ++i) {
    Thread& t = lane_of(warp, i);
    std::memcpy(&rows[i], t.in, sizeof rows[i]);
    if (reinterpret_cast<uintptr_t>(rows[i]) % 16 != 0) {
      stop_with("misaligned", thread_name(t) + " gives ldmatrix at $1 a row that is no multiple of 16",
                wait.site);
    }
    if (!kChecked) check_shared(t, rows[i], 16, Access::kRead, wait.site, "ldmatrix");
  }
  for (unsigned matrix = 0; matrix < count; ++matrix) {
    unsigned banks = 0;  // of 16 bytes
    for (unsigned i = 0; i < 8; ++i) banks |= 1u << (shared_address(rows[8 * matrix + i]) / 16 % 8);
    machine.counters.load_matrix_conflicts += 8 - static_cast<unsigned>(__builtin_popcount(banks));
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      Thread& t = lane_of(warp, lane);
      const unsigned row = lane / 4, column = lane % 4;
      uint16_t pair[2];
      for (unsigned i = 0; i < 2; ++i) {
        const char* from = transposed ? rows[8 * matrix + 2 * column + i] + 2 * row
                                      : rows[8 * matrix + row] + 4 * column + 2 * i;
        if (kChecked) check_shared(t, from, 2, Access::kRead, wait.site, "ldmatrix");
        std::memcpy(&pair[i], from, 2);
      }
      t.out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

Words4 load_matrix(const void* row, int count, bool transposed) {
  Thread& t = *current;
  std::memcpy(t.in, &row, sizeof row);
  const auto variant = static_cast<uint8_t>(count << 1 | static_cast<int>(transposed));
  arrive(t, Operation::kLoadMatrix, variant, ~0u, __builtin_return_address(0));
  return {t.out[0], t.out[1], t.out[2], t.out[3]};
}

// The target holds NaNs until the wait: reading it before shows, without the checks too.
void copy_async_16(void* shared, const void* global, bool valid) {
  Thread& t = *current;
  const void* site = __builtin_return_address(0);
  ++machine.counters.copies;
  check_shared(t, shared, 16, Access::kWrite, site, "cp.async");
  if (valid) {
    if (is_shared(global)) {
      stop_with("out of bounds", thread_name(t) + " gives cp.async at $1 a source in shared memory", site);
    }
    check_access(t, global, 16, Access::kRead, site);
  }
  const Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), t.groups, site, valid};
  if (machine.options.early_copies) {
    land(t, copy);
  } else {
    std::memset(shared, 0xff, 16);
  }
  mark_pending(t, shared, 16, site);
  t.copies.push_back(copy);
}

void copy_async_commit() { ++current->groups; }

void copy_async_wait(int groups) {
  Thread& t = *current;
  size_t kept = 0;
  for (const Copy& copy : t.copies) {
    if (copy.group + static_cast<uint32_t>(groups) < t.groups) {
      machine.options.early_copies ? mark_arrived(t, copy.shared, 16, copy.site) : land(t, copy);
    } else {
      t.copies[kept++] = copy;
    }
  }
  t.copies.resize(kept, Copy{});
}

float exp2_approx(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}

float log2_approx(float x) { return std::fabs(x) < 0x1p-126f ? -INFINITY : std::log2(x); }

uint32_t pack_bf16(float lo, float hi) { return round_bfloat16(lo) | round_bfloat16(hi) << 16; }
uint32_t pack_f16(float lo, float hi) { return round_float16(lo) | round_float16(hi) << 16; }
float unpack_f16(uint16_t bits) { return float16_value(bits); }

}  // namespace simt
