// AVX2 with products of 16-bit integers, summed in 32 bits. A table is two registers, of its entries'
// low and of their high bytes, so that two look-ups of bytes find 32 weights: less than half of the
// instructions that float32 takes.

#if defined(__x86_64__)
#include <array>
#include <cmath>

#include "integers.h"
#include "layout.h"
#include "numbers.h"

#pragma GCC target("avx2,fma,f16c")

#include "tile.h"

#include "avx2_units.h"

namespace spallm {
namespace {

using Halves = Pair<__m256i>;  // low bytes, high bytes

// The byte of a unit whose weight is the i-th when low and high bytes are unpacked into words.
constexpr int unpacked_byte(int i) { return i / 8 == 1 ? i + 8 : i / 8 == 2 ? i - 8 : i; }

// The columns of a block in the order in which they are multiplied.
template <int Bits, bool Whole>
constexpr auto kOrder = [] {
  std::array<int16_t, kBlockSteps<Bits> * kStep> order{};
  for (int i = 0; i < kBlockSteps<Bits> * kStep; ++i)
    order[i] =
        static_cast<int16_t>(unit_column(Bits, Whole, i / kStep, unpacked_byte(i % kStep)));
  return order;
}();

struct Words : Avx2Integers {
  template <int Bits>
  using Table = Halves;
  template <int Bits>
  using Weights = Pair<__m256i>;
  static constexpr bool kSlotsInSpans = false;
  static constexpr int64_t kCacheBytes = 48 << 10, kSpanBytes = 24 << 10;

  template <int Bits>
  static INLINE Halves table(const char* entries, Type) {
    const __m256i apart = _mm256_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0, 15,
                                          13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    if constexpr (Bits == 4) {
      const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
      const __m256i bytes = _mm256_shuffle_epi8(all, apart);
      return {_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xdd)};
    } else {
      const __m128i all = Bits == 3 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries))
                                    : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(entries));
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(all), apart);
      return {bytes, _mm256_srli_si256(bytes, 8)};
    }
  }

  template <int Bits>
  static INLINE Pair<__m256i> look_up(__m256i index, const Halves& table) {
    const __m256i low = _mm256_shuffle_epi8(table.even, index);
    const __m256i high = _mm256_shuffle_epi8(table.odd, index);
    return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
  }

  static INLINE Sum multiply_add(Sum sum, const Pair<__m256i>& values,
                                 const Pair<__m256i>& weights) {
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(values.even, weights.even),
                                                 _mm256_madd_epi16(values.odd, weights.odd)));
    // Else the compiler adds up in an order of its own, for which it keeps all products of a block.
    asm("" : "+x"(sum));
    return sum;
  }
};

struct UnpackedOrder {
  template <int Bits, bool Whole>
  static int64_t column(int64_t i) {
    return kOrder<Bits, Whole>[i];
  }

  template <int Bits>
  static INLINE void block(const float* x, float* out) {
    if constexpr (Bits == 2) {
      for (int i = 0; i < kBlockSteps<Bits> * kStep; ++i) out[i] = x[kOrder<Bits, true>[i]];
    } else {
      // The lanes of two steps alternate, see unit_column and unpacked_byte.
      constexpr int kPart = Bits == 4 ? kStep : 2 * kStep, kOther = Bits == 4 ? 2 * kStep : kStep;
      for (int unit = 0; unit < kBlockSteps<Bits>; ++unit, out += kStep) {
        const float* lanes = x + unit / 2 * kPart + unit % 2 * kStep / 2;
        for (int four = 0; four < 4; ++four) {
          const __m128 first = _mm_loadu_ps(lanes + 4 * four);
          const __m128 second = _mm_loadu_ps(lanes + kOther + 4 * four);
          float* at = out + (four == 1 ? 16 : four == 2 ? 8 : 8 * four);
          _mm_storeu_ps(at, _mm_unpacklo_ps(first, second));
          _mm_storeu_ps(at + 4, _mm_unpackhi_ps(first, second));
        }
      }
    }
  }
};

TokenFactors to_words(const Layout& layout, const char* x, Type type, float* ordered,
                      int16_t* out) {
  const int64_t count = order_token<UnpackedOrder>(layout, x, type, ordered);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 largest = _mm256_setzero_ps(), first = largest, second = largest, strange = largest;
  const auto see = [&](int64_t at, __m256& sums) ALWAYS_INLINE {
    const __m256 size = _mm256_andnot_ps(sign, _mm256_loadu_ps(ordered + at));
    largest = _mm256_max_ps(largest, size);
    sums = _mm256_add_ps(sums, size);
    strange = _mm256_or_ps(strange, strange_ones(size));
  };
  for (int64_t j = 0; j < count; j += 16) {
    see(j, first);
    see(j + 8, second);
  }
  // A lane of a product's sum takes two neighbours of every 16.
  const float most = largest_of(_mm256_hadd_ps(first, second));
  const bool usable = _mm256_movemask_ps(strange) == 0 && std::isfinite(most);
  const IntegerScale scale(usable, largest_of(largest) / kLargestValue, most, kLargestWord,
                           count / 8);
  const __m256 factor = _mm256_set1_ps(scale.inverse);
  const auto whole = [&](int64_t at) ALWAYS_INLINE {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(ordered + at), factor));
  };
  for (int64_t j = 0; j < count; j += 16)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out + j),
        _mm256_permute4x64_epi64(_mm256_packs_epi32(whole(j), whole(j + 8)), 0xd8));
  return {scale.value, 0.0f};
}

}  // namespace

const IntegerKernels kAvx2Words = {dot<Words>, to_words, kAvx2IntegerSteps};

}  // namespace spallm

#endif  // __x86_64__
