// AVX-512 with products of 8-bit integers, four of them summed in 32 bits: a look-up and two products
// for 64 weights, where 16 bits take two and two. Activations go in pairs, see integers.h.

#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "integers.h"
#include "layout.h"
#include "numbers.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "avx512_integers.h"

namespace spallm {
namespace {

// Two steps are multiplied together: a unit.
constexpr int kUnit = 2;

// The code of a step, at bit `To` of every word; what else is in a word does not matter.
template <int Step, int To>
INLINE __m512i three_bits(const __m512i* chunk) {
  constexpr int kWord = 3 * Step / 16, kBit = 3 * Step % 16, kShift = kBit - To;
  const __m512i low = kShift >= 0 ? _mm512_srli_epi16(chunk[kWord], kShift)
                                  : _mm512_slli_epi16(chunk[kWord], -kShift);
  if constexpr (kBit <= 13) return low;
  // The lowest bits are the first word's last ones.
  else return _mm512_or_si512(low, _mm512_slli_epi16(chunk[kWord + 1], 16 - kBit + To));
}

// The 64 codes of a unit, a byte each. In whole blocks of 2 and 4 bits they are what one shift leaves
// in all bytes, otherwise steps 2 k and 2 k + 1. See each_pair.
template <int Bits, int Unit, bool Whole>
INLINE __m512i unit_codes(const __m512i* chunk) {
  if constexpr (Bits == 3) {
    return _mm512_or_si512(
        _mm512_and_si512(three_bits<2 * Unit, 0>(chunk), _mm512_set1_epi16(7)),
        _mm512_and_si512(three_bits<2 * Unit + 1, 8>(chunk), _mm512_set1_epi16(7 << 8)));
  } else {
    const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
    if constexpr (Whole)
      return _mm512_and_si512(_mm512_srli_epi16(chunk[0], Bits * Unit), mask);
    const __m512i bytes = _mm512_srli_epi32(chunk[0], 8 * Unit);
    if constexpr (Bits == 4) {
      const __m512i low = _mm512_and_si512(bytes, _mm512_set1_epi16(0xff));
      return _mm512_and_si512(_mm512_or_si512(low, _mm512_slli_epi16(low, 4)), mask);
    } else {
      const __m512i low = _mm512_and_si512(bytes, _mm512_set1_epi32(0xff));
      const __m512i two = _mm512_or_si512(low, _mm512_slli_epi32(low, 6));
      return _mm512_and_si512(_mm512_or_si512(two, _mm512_slli_epi32(two, 12)), mask);
    }
  }
}

// X of a unit: 64 integers of 8 bits, then the factors of their 32 pairs.
struct Bytes : Avx512Integers {
  using Values = Pair<__m512i>;
  static constexpr int kUnitSteps = kUnit, kStepsTogether = kUnit;
  static constexpr bool kSlotsInSpans = true;
  static constexpr int64_t kCacheBytes = 40 << 10;

  template <int Bits, int Step, int Part, bool Whole>
  static INLINE __m512i index(const __m512i* chunk) {
    return unit_codes<Bits, Step / kUnit, Whole>(chunk);
  }

  template <int Bits>
  static INLINE __m512i table(const char* entries, Type) {
    __m512i all;
    if constexpr (Bits == 4) {
      all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    } else if constexpr (Bits == 3) {
      int64_t eight;
      std::memcpy(&eight, entries, sizeof eight);
      all = _mm512_set1_epi64(eight);
    } else {
      int32_t four;
      std::memcpy(&four, entries, sizeof four);
      all = _mm512_set1_epi32(four);
    }
    return _mm512_xor_si512(all, _mm512_set1_epi8(static_cast<char>(kByteShift)));
  }

  template <int Bits>
  static INLINE __m512i look_up(__m512i index, __m512i table) {
    return _mm512_shuffle_epi8(table, index);
  }

  static INLINE Values values(const int16_t* x) {
    return {kept(_mm512_loadu_si512(x)), kept(_mm512_loadu_si512(x + kStep))};
  }

  static INLINE Sum multiply_add(Sum sum, const Values& values, __m512i weights) {
    return kept(_mm512_dpwssd_epi32(sum, _mm512_maddubs_epi16(weights, values.even), values.odd));
  }
};

// Lanes 16 half .. 16 half + 15 of a block's steps, from where the block starts.
struct Lanes {
  const char* x;
  Type type;
  int64_t first, count;  // of what is left of a group; zeros behind it
  int half;

  INLINE __m512 operator()(int64_t step) const {
    const int64_t at = step * kStep + 16 * half;
    return load_values(x, first + at, count - at, type);
  }
};

// The activations that bytes 2 i (even) and 2 i + 1 (odd) of half a unit's codes belong to.
template <int Bits, bool Whole>
INLINE Pair<__m512> pairs(const Lanes& lanes, int unit) {
  if constexpr (Bits == 2) {
    const __m512i even = _mm512_set_epi32(30, 14, 28, 12, 26, 10, 24, 8, 22, 6, 20, 4, 18, 2, 16, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    if constexpr (Whole) {
      const int step = unit / 2;
      const __m512i from = unit % 2 == 0 ? even : odd;
      return {_mm512_permutex2var_ps(lanes(step), from, lanes(step + 4)),
              _mm512_permutex2var_ps(lanes(step + 2), from, lanes(step + 6))};
    }
    const __m512 first = lanes(2 * unit), second = lanes(2 * unit + 1);
    return {_mm512_permutex2var_ps(first, even, second),
            _mm512_permutex2var_ps(first, odd, second)};
  } else if constexpr (Bits == 4 && Whole) {
    return {lanes(unit), lanes(unit + 2)};
  } else {
    return {lanes(2 * unit), lanes(2 * unit + 1)};
  }
}

// Calls use(unit, half, pairs) for all of a token's units, in their order.
template <int Bits, typename Use>
INLINE void each_pair(const Layout& layout, const char* x, Type type, Use&& use) {
  constexpr int kSteps = kBlockSteps<Bits>;
  const int64_t width = layout.width(), steps = layout.steps();
  int64_t done = 0;
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int64_t first = step * kStep;
      const bool whole = step + kSteps <= steps;
      const int units = static_cast<int>(whole ? kSteps / kUnit : (steps - step + 1) / kUnit);
      for (int unit = 0; unit < units; ++unit, ++done)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Lanes lanes{x, type, g * width + first, width - first, half};
          use(done, half, whole ? pairs<Bits, true>(lanes, unit) : pairs<Bits, false>(lanes, unit));
        }
    }
}

INLINE __m512 sizes(const Pair<__m512>& pair) {
  return _mm512_add_ps(_mm512_abs_ps(pair.even), _mm512_abs_ps(pair.odd));
}

template <int Bits>
TokenFactors to_bytes_of(const Layout& layout, const char* x, Type type, int16_t* out) {
  __m512 largest = _mm512_setzero_ps(), sums[2] = {largest, largest};
  __mmask16 strange = 0;
  each_pair<Bits>(layout, x, type,
                  [&](int64_t, int half, const Pair<__m512>& pair) ALWAYS_INLINE {
                    strange |= strange_ones(pair.even) | strange_ones(pair.odd);
                    largest = _mm512_max_ps(largest, sizes(pair));
                    sums[half] = _mm512_add_ps(sums[half], sizes(pair));
                  });
  // A lane of a product's sum takes four neighbours of every unit.
  const float most = _mm512_reduce_max_ps(
      _mm512_max_ps(with_neighbours(sums[0]), with_neighbours(sums[1])));
  const float pair_size = _mm512_reduce_max_ps(largest);
  const bool usable = strange == 0 && std::isfinite(most);
  // Half of a lane's products are pairs, whose factors may each be rounded up by one.
  const IntegerScale scale(usable, pair_size / (kLargestPair * kLargestFactor), most,
                           kLargestShare, layout.padded(kUnit) / 16);
  const __m512 unit_size = _mm512_set1_ps(scale.inverse), one = _mm512_set1_ps(1.0f);
  const __m512 in_pairs = _mm512_set1_ps(scale.inverse / kLargestPair);
  __m512i total = _mm512_setzero_si512();
  each_pair<Bits>(
      layout, x, type,
      [&](int64_t unit, int half, const Pair<__m512>& pair) ALWAYS_INLINE {
        const __m512 wanted = _mm512_mul_ps(sizes(pair), in_pairs);
        const __m512 factor = _mm512_max_ps(
            _mm512_roundscale_ps(wanted, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC), one);
        const __m512 inverse = _mm512_div_ps(unit_size, factor);
        const __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(pair.even, inverse));
        const __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(pair.odd, inverse));
        const __m512i factors = _mm512_cvtps_epi32(factor);
        total = _mm512_add_epi32(total, _mm512_mullo_epi32(_mm512_add_epi32(even, odd), factors));
        const __m512i bytes = _mm512_or_si512(_mm512_and_si512(even, _mm512_set1_epi32(0xff)),
                                              _mm512_slli_epi32(odd, 8));
        auto* at = reinterpret_cast<__m256i*>(out + unit * kUnit * kStep) + half;
        _mm256_storeu_si256(at, _mm512_cvtepi32_epi16(bytes));
        _mm256_storeu_si256(at + 2, _mm512_cvtepi32_epi16(factors));
      });
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, total);
  int64_t sum = 0;
  for (const int32_t lane : lanes) sum += lane;
  return {scale.value, static_cast<float>(kByteShift * sum)};
}

TokenFactors to_bytes(const Layout& layout, const char* x, Type type, float*, int16_t* out) {
  const auto convert = layout.bits == 2   ? to_bytes_of<2>
                       : layout.bits == 3 ? to_bytes_of<3>
                                          : to_bytes_of<4>;
  return convert(layout, x, type, out);
}

}  // namespace

const IntegerKernels kAvx512Bytes = {dot<Bytes>, to_bytes, kUnit};

}  // namespace spallm

#endif  // __x86_64__
