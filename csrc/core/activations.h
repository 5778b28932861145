// Functions of one number that are made of exponentials: tanh, the sigmoid, the normal distribution.
#pragma once

#include "core/simd.h"

namespace pypar::PYPAR_ISA {

// tanh(x), within 3 units in the last place. Small arguments: Cephes' tanhf, since the quotient would cancel.
PYPAR_INLINE Float tanh(Float x) {
  const Float square = x * x;
  Float p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Float small = p * square * x + x;
  const Float size = as_float(as_int(x) & 0x7fffffff);
  const Float large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  const Int sign = as_int(x) & static_cast<int32_t>(0x80000000u);
  return select(size < 0.625f, small, as_float(as_int(large) | sign));
}

// e^-|x|, within 2 units in the last place; below 2^-125 it is zero.
PYPAR_INLINE Float exp_of_negative(Float x) {
  constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f, kShift = 12582912.0f;  // 1.5 * 2^23
  const Float negative = as_float(as_int(x) | static_cast<int32_t>(0x80000000u));
  const Float shifted = negative * kLog2e + kShift;  // ends in the bits of the nearest whole number
  const Float f = negative * kLog2eRest + product_minus(negative, kLog2e, shifted - kShift);
  const Float p = exp2_of_fraction(f);
  const Float result = as_float(as_int(p) + (as_int(shifted) << 23));
  return select(negative < -86.5f, zero(), result);
}

// 1 / (1 + e^-x) and one minus it, both within 4 units in the last place.
struct Sigmoid {
  Float value, rest;
};

PYPAR_INLINE Sigmoid sigmoid(Float x) {
  const Float power = exp_of_negative(x);
  const Float greater = 1.0f / (power + 1.0f), less = power * greater;
  return {select(as_int(x) < 0, less, greater), select(as_int(x) < 0, greater, less)};
}

// What is known of a standard normal z at x: P(z <= x), and the density.
struct Normal {
  Float below, density;
};

// P(z > |x|) e^(x^2 / 2) is a polynomial of 1 / (1 + 0.3 |x|) up to |x| = 10: relative error 5e-8 (minimax,
// found by Lawson's iteration). Unlike 1 + erf, it loses no digits where x is negative.
PYPAR_INLINE Normal standard_normal(Float x) {
  const Float size = as_float(as_int(x) & 0x7fffffff);
  const Float q = 1.0f / (size * 0.3f + 1.0f);
  Float p = q * 0.03754752f - 0.16507529f;
  p = p * q + 0.22008123f;
  p = p * q - 0.06652062f;
  p = p * q + 0.13549431f;
  p = p * q + 0.09775674f;
  p = p * q + 0.12111109f;
  p = p * q + 0.11960505f;
  const Float power = exp_of_negative(x * x * 0.5f);
  const Float beyond = p * q * power;
  return {select(x < 0.0f, beyond, 1.0f - beyond), power * 0.3989422804f};
}

}  // namespace pypar::PYPAR_ISA
