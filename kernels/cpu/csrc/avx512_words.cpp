// AVX-512 with products of 16-bit integers, summed in 32 bits: half as many instructions as float32
// takes, and more digits than integers of 8 bits have. Tables come as integers, each row with its scale;
// activations are made integers here, each token with its scale, such that no sum can overflow.

#if defined(__x86_64__)
#include <cmath>

#include "integers.h"
#include "layout.h"
#include "numbers.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "avx512_integers.h"

namespace spallm {
namespace {

struct Words : Avx512Integers {
  using Values = __m512i;

  template <int Bits>
  static INLINE __m512i table(const char* entries, Type) {
    if constexpr (Bits == 4) {
      return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)));
    } else {
      constexpr __mmask16 kMask = static_cast<__mmask16>((1u << (1 << Bits)) - 1);
      return spread_words<Bits>(_mm256_maskz_loadu_epi16(kMask, entries));
    }
  }

  template <int Bits>
  static INLINE __m512i look_up(__m512i index, __m512i table) {
    if constexpr (Bits == 2) return _mm512_permutexvar_epi32(index, table);
    else return _mm512_permutexvar_epi16(index, table);
  }

  static INLINE __m512i values(const int16_t* x) { return kept(_mm512_loadu_si512(x)); }

  static INLINE Sum multiply_add(Sum sum, __m512i values, __m512i weights) {
    return kept(_mm512_dpwssd_epi32(sum, values, weights));
  }
};

TokenFactors to_words(const Layout& layout, const char* x, Type type, float*, int16_t* out) {
  const int64_t width = layout.width(), padded_width = layout.steps() * kStep;
  __m512 largest = _mm512_setzero_ps(), first = largest, second = largest;
  __mmask16 strange = 0;
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t j = 0; j < width; j += kStep) {
      const __m512 low = _mm512_abs_ps(load_values(x, g * width + j, width - j, type));
      const __m512 high = _mm512_abs_ps(load_values(x, g * width + j + 16, width - j - 16, type));
      strange |= strange_ones(low) | strange_ones(high);
      largest = _mm512_max_ps(largest, _mm512_max_ps(low, high));
      first = _mm512_add_ps(first, low);
      second = _mm512_add_ps(second, high);
    }
  // A lane of a product's sum takes two neighbours of every step.
  const float most = _mm512_reduce_max_ps(
      _mm512_max_ps(with_neighbours(first), with_neighbours(second)));
  // No number is among them, or their sum is beyond what float32 holds.
  const bool usable = strange == 0 && std::isfinite(most);
  const IntegerScale scale(usable, _mm512_reduce_max_ps(largest) / kLargestValue, most,
                           kLargestWord, 2 * layout.padded() / kStep);
  const __m512 factor = _mm512_set1_ps(scale.inverse);
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t j = 0; j < padded_width; j += 16) {
      const __m512 values = load_values(x, g * width + j, width - j, type);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + g * padded_width + j),
                          _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(values, factor))));
    }
  return {scale.value, 0.0f};
}

}  // namespace

const IntegerKernels kAvx512Words = {dot<Words>, to_words, 1};

}  // namespace spallm

#endif  // __x86_64__
