// AVX-512 as far as all processors with it have it; products in float32. A table is one register of
// 16 floats and a look-up one permutation for 16 weights: of even columns, then of odd ones, which
// is how codes lie in the two halves of a word. Activations lie in that order, too.

#if defined(__x86_64__)
#include "layout.h"
#include "numbers.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "avx512.h"
#include "dense.h"

namespace spallm {
namespace {

using Floats = Pair<__m512>;

struct Float32 : Avx512 {
  using X = float;
  using Values = Floats;
  template <int Bits>
  using Table = __m512;
  template <int Bits>
  using Weights = Floats;

  template <int Bits>
  static INLINE __m512 table(const char* entries, Type type) {
    return spread_floats<Bits>(load_floats<Bits>(entries, type));
  }

  template <int Bits>
  static INLINE Floats look_up(__m512i index, __m512 table) {
    const __m512i odd = _mm512_srli_epi32(index, Bits == 2 ? 2 : 16);
    return {_mm512_permutexvar_ps(index, table), _mm512_permutexvar_ps(odd, table)};
  }

  static INLINE Floats values(const float* x) {
    return {kept(_mm512_loadu_ps(x)), kept(_mm512_loadu_ps(x + 16))};
  }

  static INLINE __m512 multiply_add(__m512 sum, const Floats& values, const Floats& weights) {
    return kept(_mm512_fmadd_ps(values.odd, weights.odd,
                                _mm512_fmadd_ps(values.even, weights.even, sum)));
  }
};

template <int Bits>
void decode_float32_bits(const Layout& layout, const uint8_t* codes, const float* tables,
                         float* out, int64_t group_stride) {
  decode_groups<Bits>(layout, codes, tables,
                      [&](int64_t g, int64_t step, __m512 first, __m512 second) ALWAYS_INLINE {
                        float* at = out + g * group_stride + step * kStep;
                        const __mmask32 live = columns_below(group_stride, step);
                        _mm512_mask_storeu_ps(at, static_cast<__mmask16>(live), first);
                        _mm512_mask_storeu_ps(at + 16, static_cast<__mmask16>(live >> 16), second);
                      });
}

// As to_bfloat16, 16 at a time.
INLINE __m256i rounded(__m512 values) {
  const __m512i words = _mm512_castps_si512(values), upper = _mm512_srli_epi32(words, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(words, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(nearest, nan, upper, _mm512_set1_epi32(0x40)));
}

void decode_bfloat16(const Layout& layout, const uint8_t* codes, const float* tables,
                     uint16_t* out, int64_t group_stride) {
  const auto narrow = [](__m512 first, __m512 second) ALWAYS_INLINE {
    return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(first)), rounded(second), 1);
  };
  if (layout.bits == 2)
    decode_bfloat16_bits<2>(layout, codes, tables, out, group_stride, narrow);
  else if (layout.bits == 3)
    decode_bfloat16_bits<3>(layout, codes, tables, out, group_stride, narrow);
  else
    decode_bfloat16_bits<4>(layout, codes, tables, out, group_stride, narrow);
}

template <int Bits>
void bucket_sums_bits(const Layout& layout, const uint8_t* codes, const float* values,
                      float* sums) {
  constexpr int kEntries = 1 << Bits;
  for (int64_t g = 0; g < layout.groups; ++g) {
    __m512 bucket[kEntries];
#pragma GCC unroll 16
    for (int k = 0; k < kEntries; ++k) bucket[k] = _mm512_setzero_ps();
    const float* group = values + g * layout.width();
    each_step<Bits>(
        codes + g * layout.chunks() * kChunk, layout.steps(),
        [&](int64_t step, __m512i first, __m512i second) ALWAYS_INLINE {
          const __mmask32 live = columns_below(layout.width(), step);
          const __m512i low_bits = _mm512_set1_epi32(kEntries - 1);
          const __m512i codes_of[2] = {_mm512_and_si512(first, low_bits),
                                       _mm512_and_si512(second, low_bits)};
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __mmask16 mask = static_cast<__mmask16>(live >> (16 * half));
            const __m512 value = _mm512_maskz_loadu_ps(mask, group + step * kStep + 16 * half);
#pragma GCC unroll 16
            for (int k = 0; k < kEntries; ++k) {
              const __mmask16 here = _mm512_cmpeq_epi32_mask(codes_of[half], _mm512_set1_epi32(k));
              bucket[k] = _mm512_mask_add_ps(bucket[k], here, bucket[k], value);
            }
          }
        },
        std::make_integer_sequence<int, kBlockSteps<Bits>>{});
#pragma GCC unroll 16
    for (int k = 0; k < kEntries; ++k) sums[g * kEntries + k] = _mm512_reduce_add_ps(bucket[k]);
  }
}

}  // namespace

void avx512_dot_float32(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                        const char* const* tables, Type type, const float* const* x,
                        float* products) {
  dot<Float32>(layout, codes, rows, batch, tables, type, x, products);
}

void avx512_decode_float32(const Layout& layout, const uint8_t* codes, const float* tables,
                           float* out, int64_t group_stride) {
  if (layout.bits == 2) decode_float32_bits<2>(layout, codes, tables, out, group_stride);
  else if (layout.bits == 3) decode_float32_bits<3>(layout, codes, tables, out, group_stride);
  else decode_float32_bits<4>(layout, codes, tables, out, group_stride);
}

void avx512_bucket_sums(const Layout& layout, const uint8_t* codes, const float* values,
                        float* sums) {
  if (layout.bits == 2) bucket_sums_bits<2>(layout, codes, values, sums);
  else if (layout.bits == 3) bucket_sums_bits<3>(layout, codes, values, sums);
  else bucket_sums_bits<4>(layout, codes, values, sums);
}

void avx512_dense_rows(const uint16_t* row, int64_t columns, const float* x, int64_t tokens,
                       float* y, int64_t y_stride) {
  dense_rows<64>(row, columns, x, tokens, y, y_stride);
}

const Kernels kAvx512 = {
    16, nullptr, avx512_dot_float32, &kAvx512Words, &kAvx512Bytes,
    avx512_decode_float32, decode_bfloat16, avx512_bucket_sums,
    avx512_dense_rows,
};

}  // namespace spallm

#endif  // __x86_64__
