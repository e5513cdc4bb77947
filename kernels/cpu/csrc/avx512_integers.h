// What AVX-512's products of integers share. To be included after the file's target pragma.

#pragma once

#include "avx512.h"

namespace spallm {
namespace {

// 16 values, of which `count` are there; zeros for the others.
INLINE __m512 load_values(const char* x, int64_t index, int64_t count, Type type) {
  const __mmask16 mask =
      count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
  if (type == kFloat32)
    return _mm512_maskz_loadu_ps(mask, reinterpret_cast<const float*>(x) + index);
  const __m256i words =
      _mm256_maskz_loadu_epi16(mask, reinterpret_cast<const uint16_t*>(x) + index);
  if (type == kFloat16) return _mm512_cvtph_ps(words);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// The lanes that hold no number, or an infinite one.
INLINE __mmask16 strange_ones(__m512 values) {
  // Quiet and signalling NaN, both infinities.
  return _mm512_fpclass_ps_mask(values, 0x01 | 0x80 | 0x08 | 0x10);
}

INLINE __m512 with_neighbours(__m512 sums) {
  return _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
}

// Sums of integers of 32 bits in every lane.
struct Avx512Integers : Avx512 {
  using X = int16_t;
  using Sum = __m512i;
  template <int Bits>
  using Table = __m512i;
  template <int Bits>
  using Weights = __m512i;

  static INLINE Sum zero() { return _mm512_setzero_si512(); }

  // A lane's sum fits 32 bits, that of all lanes need not.
  static INLINE void lane_sums(Sum a, Sum b, Sum c, Sum d, float* out) {
    Avx512::lane_sums(_mm512_cvtepi32_ps(a), _mm512_cvtepi32_ps(b), _mm512_cvtepi32_ps(c),
                      _mm512_cvtepi32_ps(d), out);
  }
};

}  // namespace
}  // namespace spallm
