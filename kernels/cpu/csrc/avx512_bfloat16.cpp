// AVX-512 with bfloat16 products. A table is one register and a look-up one permutation: of words
// for 3 and 4 bits (16 entries, twice), of pairs of words for 2 bits (all 16 pairs of 4 entries).
// Upper bits of an index pick one of the table's copies, so codes are shifted into place, no more.

#if defined(__x86_64__)
#include "layout.h"
#include "numbers.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

#include "avx512.h"

namespace spallm {
namespace {

struct Bfloat16 : Avx512 {
  using X = uint16_t;
  using Values = __m512bh;
  template <int Bits>
  using Table = __m512i;
  template <int Bits>
  using Weights = __m512bh;

  template <int Bits>
  static INLINE __m512i table(const char* entries, Type type) {
    constexpr __mmask16 kMask = static_cast<__mmask16>((1u << (1 << Bits)) - 1);
    if (type == kBfloat16) return spread_words<Bits>(_mm256_maskz_loadu_epi16(kMask, entries));
    return spread_words<Bits>((__m256i)_mm512_cvtneps_pbh(load_floats<Bits>(entries, type)));
  }

  template <int Bits>
  static INLINE __m512bh look_up(__m512i index, __m512i table) {
    if constexpr (Bits == 2) return (__m512bh)_mm512_permutexvar_epi32(index, table);
    else return (__m512bh)_mm512_permutexvar_epi16(index, table);
  }

  static INLINE __m512bh values(const uint16_t* x) {
    return (__m512bh)kept(_mm512_loadu_si512(x));
  }

  static INLINE __m512 multiply_add(__m512 sum, __m512bh values, __m512bh weights) {
    return kept(_mm512_dpbf16_ps(sum, values, weights));
  }
};

void decode_bfloat16(const Layout& layout, const uint8_t* codes, const float* tables,
                     uint16_t* out, int64_t group_stride) {
  const auto narrow = [](__m512 first, __m512 second) ALWAYS_INLINE {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
  };
  if (layout.bits == 2)
    decode_bfloat16_bits<2>(layout, codes, tables, out, group_stride, narrow);
  else if (layout.bits == 3)
    decode_bfloat16_bits<3>(layout, codes, tables, out, group_stride, narrow);
  else
    decode_bfloat16_bits<4>(layout, codes, tables, out, group_stride, narrow);
}

}  // namespace

const Kernels kAvx512Bfloat16 = {
    16, dot<Bfloat16>, avx512_dot_float32, &kAvx512Words, &kAvx512Bytes,
    avx512_decode_float32, decode_bfloat16, avx512_bucket_sums,
    avx512_dense_rows,
};

}  // namespace spallm

#endif  // __x86_64__
