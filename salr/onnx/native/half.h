// Half precision in plain C++: exact to float, to nearest even from float.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace salr {
namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
}

inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past the largest half
  if (size < 0x38800000u) {  // below the smallest normal half: adding 0.5 rounds at 2^-24
    const float shifted = float_of_bits(size) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = size + 0xfffu + (size >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

inline float input_at(const void* x, bool is_half, int64_t index) {
  return is_half ? float_of_half(static_cast<const uint16_t*>(x)[index]) : static_cast<const float*>(x)[index];
}

inline void store(const Output& out, int64_t input, int64_t row, float value) {
  const int64_t index = input * out.ld + row;
  if (out.is_half)
    static_cast<uint16_t*>(out.data)[index] = half_of_float(value);
  else
    static_cast<float*>(out.data)[index] = value;
}

}  // namespace
}  // namespace salr
