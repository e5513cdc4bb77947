// AVX2: rows are decoded to float32 and multiplied there. Eight entries fit a register; sixteen take
// two look-ups and a choice by the code's highest bit.

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")

#include <immintrin.h>

#include "layout.h"

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace spallm {
namespace {

template <int Bits>
struct Table {
  __m256 low, high;

  explicit INLINE Table(const float* entries) {
    low = Bits == 2 ? _mm256_broadcast_ps(reinterpret_cast<const __m128*>(entries))
                    : _mm256_loadu_ps(entries);
    high = Bits == 4 ? _mm256_loadu_ps(entries + 8) : low;
  }

  // Bits of an index above the code's own do not matter.
  INLINE __m256 look_up(__m256i index) const {
    const __m256 below = _mm256_permutevar8x32_ps(low, index);
    if constexpr (Bits != 4) return below;
    const __m256 above = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};

// The indices of eight columns, from column 8 * eighth of a step on.
template <int Bits>
INLINE __m256i indices(const uint8_t* group, int64_t step, int eighth) {
  if constexpr (Bits == 2) {
    const uint8_t* at = group + (step / 8) * kChunk + eighth * 16;
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m128i even = _mm_srl_epi32(words, _mm_cvtsi32_si128(static_cast<int>(4 * (step % 8))));
    const __m128i odd = _mm_srli_epi32(even, 2);
    return _mm256_set_m128i(_mm_unpackhi_epi32(even, odd), _mm_unpacklo_epi32(even, odd));
  } else {
    const int64_t bit = Bits * step;
    const int shift = static_cast<int>(bit % 16);
    const uint8_t* at = group + (bit / 16) * kChunk + eighth * 16;
    __m128i words = _mm_srl_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)),
                                  _mm_cvtsi32_si128(shift));
    if (shift + Bits > 16)
      words = _mm_or_si128(
          words, _mm_sll_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + kChunk)),
                               _mm_cvtsi32_si128(16 - shift)));
    return _mm256_cvtepu16_epi32(words);
  }
}

template <int Bits>
INLINE void decode_step(const uint8_t* group, const Table<Bits>& table, int64_t step, float* out) {
#pragma GCC unroll 4
  for (int eighth = 0; eighth < 4; ++eighth)
    _mm256_storeu_ps(out + 8 * eighth, table.look_up(indices<Bits>(group, step, eighth)));
}

template <int Bits, typename Out, typename Store>
INLINE void decode_groups(const Layout& layout, const uint8_t* codes, const float* tables, Out* out,
                          int64_t group_stride, Store&& store) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const uint8_t* group = codes + g * layout.chunks() * kChunk;
    const Table<Bits> table(tables + g * layout.entries());
    for (int64_t start = 0; start < group_stride; start += kStep) {
      float weights[kStep];
      decode_step<Bits>(group, table, start / kStep, weights);
      const int64_t left = group_stride - start;
      store(weights, out + g * group_stride + start, left < kStep ? left : kStep);
    }
  }
}

template <typename Out, typename Store>
INLINE void decode(const Layout& layout, const uint8_t* codes, const float* tables, Out* out,
                   int64_t group_stride, Store&& store) {
  if (layout.bits == 2) decode_groups<2>(layout, codes, tables, out, group_stride, store);
  else if (layout.bits == 3) decode_groups<3>(layout, codes, tables, out, group_stride, store);
  else decode_groups<4>(layout, codes, tables, out, group_stride, store);
}

void decode_float32(const Layout& layout, const uint8_t* codes, const float* tables, float* out,
                    int64_t group_stride) {
  decode(layout, codes, tables, out, group_stride,
         [](const float* weights, float* at, int64_t count) ALWAYS_INLINE {
           for (int64_t j = 0; j < count; ++j) at[j] = weights[j];
         });
}

void decode_bfloat16(const Layout& layout, const uint8_t* codes, const float* tables,
                     uint16_t* out, int64_t group_stride) {
  decode(layout, codes, tables, out, group_stride,
         [](const float* weights, uint16_t* at, int64_t count) ALWAYS_INLINE {
           for (int64_t j = 0; j < count; ++j) at[j] = to_bfloat16(weights[j]);
         });
}

float dot_float32(const float* a, const float* b, int64_t count) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
  int64_t j = 0;
  for (; j + 32 <= count; j += 32)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      sums[c] = _mm256_fmadd_ps(_mm256_loadu_ps(a + j + 8 * c), _mm256_loadu_ps(b + j + 8 * c),
                                sums[c]);
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]),
                                        _mm256_add_ps(sums[2], sums[3])));
  float total = 0;
  for (int lane = 0; lane < 8; ++lane) total += lanes[lane];
  for (; j < count; ++j) total += a[j] * b[j];
  return total;
}

}  // namespace

const Kernels kAvx2 = {
    "avx2", nullptr, decode_float32, decode_bfloat16, dot_float32, scalar_bucket_sums,
};

}  // namespace spallm

#endif  // __x86_64__
