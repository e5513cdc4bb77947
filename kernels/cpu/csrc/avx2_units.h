// Codes with AVX2, a byte each: what products of integers look up; and the order of activations that
// goes with them. To be included after the file's target pragma and tile.h.

#pragma once

#include <immintrin.h>

namespace spallm {
namespace {

INLINE __m256i load_half(const uint8_t* chunk, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk + 32 * half));
}

// The code of a step, at bit `To` of every word; what else is in a word does not matter.
template <int Step, int To>
INLINE __m256i three_bits(const uint8_t* const* chunk, int half) {
  constexpr int kWord = 3 * Step / 16, kShift = 3 * Step % 16 - To;
  const __m256i words = load_half(chunk[kWord], half);
  const __m256i low =
      kShift >= 0 ? _mm256_srli_epi16(words, kShift) : _mm256_slli_epi16(words, -kShift);
  if constexpr (3 * Step % 16 <= 13) return low;
  // The lowest bits are the first word's last ones.
  return _mm256_or_si256(
      low, _mm256_slli_epi16(load_half(chunk[kWord + 1], half), 16 - 3 * Step % 16 + To));
}

// The 32 codes of a unit, a byte each. Unit 2 k + h of a block comes from half h of its chunks. In
// whole blocks of 2 and 4 bits it is what one shift leaves in all bytes, otherwise steps 2 k and
// 2 k + 1. See unit_column.
template <int Bits, int Unit, bool Whole>
INLINE __m256i unit_codes(const uint8_t* const* chunk) {
  constexpr int kHalf = Unit % 2, kPart = Unit / 2;
  if constexpr (Bits == 3) {
    return _mm256_or_si256(
        _mm256_and_si256(three_bits<2 * kPart, 0>(chunk, kHalf), _mm256_set1_epi16(7)),
        _mm256_and_si256(three_bits<2 * kPart + 1, 8>(chunk, kHalf), _mm256_set1_epi16(7 << 8)));
  } else {
    const __m256i words = load_half(chunk[0], kHalf), mask = _mm256_set1_epi8((1 << Bits) - 1);
    if constexpr (Whole) return _mm256_and_si256(_mm256_srli_epi16(words, Bits * kPart), mask);
    const __m256i bytes = _mm256_srli_epi32(words, 8 * kPart);
    if constexpr (Bits == 4) {
      const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi16(0xff));
      return _mm256_and_si256(_mm256_or_si256(low, _mm256_slli_epi16(low, 4)), mask);
    } else {
      const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(0xff));
      const __m256i two = _mm256_or_si256(low, _mm256_slli_epi32(low, 6));
      return _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi32(two, 12)), mask);
    }
  }
}

// The column, of its block, of a byte of unit_codes.
constexpr int unit_column(int bits, bool whole, int unit, int byte) {
  const int half = unit % 2, part = unit / 2;
  if (bits == 2) {
    const int word = 8 * half + byte / 4, in_word = byte % 4;
    return whole ? (2 * in_word + part / 2) * kStep + 2 * word + part % 2
                 : (2 * part + in_word / 2) * kStep + 2 * word + in_word % 2;
  }
  const int lane = 16 * half + byte / 2, in_word = byte % 2;
  const int step = bits == 4 && whole ? 2 * in_word + part : 2 * part + in_word;
  return step * kStep + lane;
}

// One group of a token's activations in the order in which they are multiplied; zeros for what fills
// up its last steps.
//
//   struct Order {
//     column<Bits, Whole>(i)   // of a block that is whole, or is not, the i-th that is multiplied
//     block<Bits>(from, out)   // a whole one
//   };
template <typename Order, int Bits>
void order_group(const char* x, Type type, int64_t first, int64_t width, int64_t padded_width,
                 float* out) {
  constexpr int kColumns = kBlockSteps<Bits> * kStep;
  const int64_t filled = (width + kStep - 1) / kStep * kStep;
  for (int64_t start = 0; start < padded_width; start += kColumns, out += kColumns) {
    if (type == kFloat32 && start + kColumns <= width) {
      Order::template block<Bits>(reinterpret_cast<const float*>(x) + first + start, out);
      continue;
    }
    const bool whole = filled - start >= kColumns;
    const int64_t count = whole ? kColumns : padded_width - start;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column =
          start + (whole ? Order::template column<Bits, true>(i)
                         : Order::template column<Bits, false>(i));
      out[i] = column < width ? load(x, first + column, type) : 0.0f;
    }
  }
}

// All groups of a token, each filled up to whole multiples of kAvx2IntegerSteps; how many they are.
template <typename Order>
int64_t order_token(const Layout& layout, const char* x, Type type, float* ordered) {
  const int64_t count = layout.padded(kAvx2IntegerSteps), padded_width = count / layout.groups;
  const auto order = layout.bits == 2   ? order_group<Order, 2>
                     : layout.bits == 3 ? order_group<Order, 3>
                                        : order_group<Order, 4>;
  for (int64_t g = 0; g < layout.groups; ++g)
    order(x, type, g * layout.width(), layout.width(), padded_width, ordered + g * padded_width);
  return count;
}

// What is no number, or infinite, is none times zero.
INLINE __m256 strange_ones(__m256 sizes) {
  const __m256 zero = _mm256_mul_ps(sizes, _mm256_setzero_ps());
  return _mm256_cmp_ps(zero, zero, _CMP_UNORD_Q);
}

INLINE float largest_of(__m256 values) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// What both kinds of integers share of what tile.h asks for.
struct Avx2Integers {
  using X = int16_t;
  using Values = Pair<__m256i>;
  using Sum = __m256i;
  using Codes = const uint8_t*;
  template <int Bits>
  using Index = __m256i;
  static constexpr int kUnitSteps = 1, kStepsTogether = kAvx2IntegerSteps;
  static constexpr int kParts = 1, kPartColumns = kStep;
  static constexpr int kFewTokens = 2, kFewRows = 2, kManyRows = 1;

  static INLINE Sum zero() { return _mm256_setzero_si256(); }
  static INLINE Codes codes(const uint8_t* at) { return at; }

  template <int Bits, int Step, int Part, bool Whole>
  static INLINE __m256i index(const Codes* chunk) {
    return unit_codes<Bits, Step, Whole>(chunk);
  }

  static INLINE Values values(const int16_t* x) {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }

  static INLINE void lane_sums(Sum a, Sum b, Sum c, Sum d, float* out) {
    // A lane's sum fits 32 bits, that of all lanes need not.
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)),
                                      _mm256_hadd_ps(_mm256_cvtepi32_ps(c), _mm256_cvtepi32_ps(d)));
    _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

}  // namespace
}  // namespace spallm
