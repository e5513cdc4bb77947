// AVX2 with products of 8-bit integers, four of them summed in 32 bits: half as many instructions as
// 16-bit ones take, and one look-up for 32 weights where those need two and two more to merge them.
// Activations go in pairs, see integers.h.

#if defined(__x86_64__)
#include <array>
#include <cmath>
#include <cstring>

#include "integers.h"
#include "layout.h"
#include "numbers.h"

#pragma GCC target("avx2,fma,f16c")

#include "tile.h"

#include "avx2_units.h"

namespace spallm {
namespace {

// X of a step: 32 integers of 8 bits, then the factors of their 16 pairs.
struct Bytes : Avx2Integers {
  template <int Bits>
  using Table = __m256i;
  template <int Bits>
  using Weights = __m256i;
  static constexpr bool kSlotsInSpans = true;
  static constexpr int64_t kCacheBytes = 32 << 10, kSpanBytes = 16 << 10;

  template <int Bits>
  static INLINE __m256i table(const char* entries, Type) {
    __m256i all;
    if constexpr (Bits == 4) {
      all = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    } else if constexpr (Bits == 3) {
      all = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(entries)));
    } else {
      int32_t four;
      std::memcpy(&four, entries, sizeof four);
      all = _mm256_set1_epi32(four);
    }
    return _mm256_xor_si256(all, _mm256_set1_epi8(static_cast<char>(kByteShift)));
  }

  template <int Bits>
  static INLINE __m256i look_up(__m256i index, __m256i table) {
    return _mm256_shuffle_epi8(table, index);
  }

  static INLINE Sum multiply_add(Sum sum, const Values& values, __m256i weights) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, values.even);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, values.odd));
    // Else the compiler adds up in an order of its own, for which it keeps all products of a block.
    asm("" : "+x"(sum));
    return sum;
  }
};

// The columns of a block in the order in which they are multiplied.
template <int Bits, bool Whole>
constexpr auto kOrder = [] {
  std::array<int16_t, kBlockSteps<Bits> * kStep> order{};
  for (int i = 0; i < kBlockSteps<Bits> * kStep; ++i)
    order[i] = static_cast<int16_t>(unit_column(Bits, Whole, i / kStep, i % kStep));
  return order;
}();

struct UnitOrder {
  template <int Bits, bool Whole>
  static int64_t column(int64_t i) {
    return kOrder<Bits, Whole>[i];
  }

  template <int Bits>
  static INLINE void block(const float* x, float* out) {
    if constexpr (Bits == 2) {
      for (int i = 0; i < kBlockSteps<Bits> * kStep; ++i) out[i] = x[kOrder<Bits, true>[i]];
    } else {
      // The lanes of two steps alternate, see unit_column.
      constexpr int kPart = Bits == 4 ? kStep : 2 * kStep, kOther = Bits == 4 ? 2 * kStep : kStep;
      for (int unit = 0; unit < kBlockSteps<Bits>; ++unit) {
        const float* lanes = x + unit / 2 * kPart + unit % 2 * kStep / 2;
        for (int four = 0; four < 4; ++four, out += 8) {
          const __m128 first = _mm_loadu_ps(lanes + 4 * four);
          const __m128 second = _mm_loadu_ps(lanes + kOther + 4 * four);
          _mm_storeu_ps(out, _mm_unpacklo_ps(first, second));
          _mm_storeu_ps(out + 4, _mm_unpackhi_ps(first, second));
        }
      }
    }
  }
};

INLINE __m256 sizes(const float* at) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(at));
}

// The sizes of each pair together, twice.
INLINE __m256 pair_sizes(const float* at) {
  const __m256 own = sizes(at);
  return _mm256_add_ps(own, _mm256_permute_ps(own, 0xb1));
}

// What was packed from four registers in each half, in their order.
INLINE __m256i unpacked(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// One step of activations in the order of their multiplication. Adds what has been multiplied by what
// to `total`.
INLINE void step_to_bytes(const float* ordered, float inverse, int16_t* out, __m256i& total) {
  __m256i values[4];
  __m256 factors[4];
  const __m256 unit = _mm256_set1_ps(inverse), one = _mm256_set1_ps(1.0f);
  const __m256 in_pairs = _mm256_set1_ps(inverse / kLargestPair);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m256 wanted = _mm256_mul_ps(pair_sizes(ordered + 8 * k), in_pairs);
    factors[k] = _mm256_max_ps(_mm256_ceil_ps(wanted), one);
    values[k] = _mm256_cvtps_epi32(
        _mm256_mul_ps(_mm256_loadu_ps(ordered + 8 * k), _mm256_div_ps(unit, factors[k])));
    total = _mm256_add_epi32(
        total, _mm256_mullo_epi32(values[k], _mm256_cvtps_epi32(factors[k])));
  }
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(values[0], values[1]),
                                           _mm256_packs_epi32(values[2], values[3]));
  const auto once = [&](int k) ALWAYS_INLINE {
    return _mm256_cvtps_epi32(_mm256_shuffle_ps(factors[k], factors[k + 1], 0x88));
  };
  const __m256i words = _mm256_packs_epi32(once(0), once(2));
  auto* at = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(at, unpacked(bytes));
  _mm256_storeu_si256(at + 1, unpacked(words));
}

TokenFactors to_bytes(const Layout& layout, const char* x, Type type, float* ordered,
                      int16_t* out) {
  const int64_t count = order_token<UnitOrder>(layout, x, type, ordered);
  __m256 largest = _mm256_setzero_ps(), sums = largest, strange = largest;
  for (int64_t j = 0; j < count; j += kStep) {
    const float* at = ordered + j;
    for (int k = 0; k < 4; ++k) {
      largest = _mm256_max_ps(largest, pair_sizes(at + 8 * k));
      strange = _mm256_or_ps(strange, strange_ones(sizes(at + 8 * k)));
    }
    // A lane of a product's sum takes four neighbours of every step.
    sums = _mm256_add_ps(sums, _mm256_hadd_ps(_mm256_hadd_ps(sizes(at), sizes(at + 8)),
                                              _mm256_hadd_ps(sizes(at + 16), sizes(at + 24))));
  }
  const float most = largest_of(sums), pair = largest_of(largest);
  const bool usable = _mm256_movemask_ps(strange) == 0 && std::isfinite(most);
  // Half of a lane's products are pairs, whose factors may each be rounded up by one.
  const IntegerScale scale(usable, pair / (kLargestPair * kLargestFactor), most, kLargestShare,
                           count / 8);
  __m256i total = _mm256_setzero_si256();
  for (int64_t j = 0; j < count; j += kStep)
    step_to_bytes(ordered + j, scale.inverse, out + j, total);
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
  int64_t sum = 0;
  for (const int32_t lane : lanes) sum += lane;
  return {scale.value, static_cast<float>(kByteShift * sum)};
}

}  // namespace

const IntegerKernels kAvx2Bytes = {dot<Bytes>, to_bytes, kAvx2IntegerSteps};

}  // namespace spallm

#endif  // __x86_64__
