// Numbers of the three floating point types that tensors come in, one at a time.

#pragma once

#include "layout.h"

namespace spallm {

inline float bits_to_float(uint32_t word) {
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  return word;
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // A product with 2^112 moves the exponent over, and makes subnormal numbers normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even.
inline uint16_t to_float16(float value) {
  const uint32_t word = float_to_bits(value), sign = (word >> 16) & 0x8000u;
  const uint32_t magnitude = word & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: the unit in the last place is 2^-24
    const float units = bits_to_float(magnitude) * 0x1p24f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_nearbyintf(units)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float load(const char* base, int64_t index, Type type) {
  if (type == kFloat32) return reinterpret_cast<const float*>(base)[index];
  const uint16_t half = reinterpret_cast<const uint16_t*>(base)[index];
  return type == kBfloat16 ? from_bfloat16(half) : from_float16(half);
}

inline void store(char* base, int64_t index, Type type, float value) {
  if (type == kFloat32) reinterpret_cast<float*>(base)[index] = value;
  else reinterpret_cast<uint16_t*>(base)[index] =
      type == kBfloat16 ? to_bfloat16(value) : to_float16(value);
}

inline int64_t size_of(Type type) { return type == kFloat32 ? 4 : type == kByte ? 1 : 2; }

}  // namespace spallm
