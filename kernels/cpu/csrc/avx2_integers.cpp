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

#include <immintrin.h>

#include "tile.h"

namespace spallm {
namespace {

using Bytes = Pair<__m256i>;  // the low ones, the high ones

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

struct Integers {
  using X = int16_t;
  using Values = Pair<__m256i>;
  using Sum = __m256i;
  using Codes = const uint8_t*;
  template <int Bits>
  using Index = __m256i;
  template <int Bits>
  using Table = Bytes;
  template <int Bits>
  using Weights = Pair<__m256i>;
  static constexpr int kParts = 1, kPartColumns = kStep, kStepsTogether = kAvx2IntegerSteps;
  static constexpr int kFewTokens = 2, kFewRows = 2, kManyRows = 1;

  static INLINE Sum zero() { return _mm256_setzero_si256(); }
  static INLINE Codes codes(const uint8_t* at) { return at; }

  template <int Bits, int Step, int Part, bool Whole>
  static INLINE __m256i index(const Codes* chunk) {
    return unit_codes<Bits, Step, Whole>(chunk);
  }

  template <int Bits>
  static INLINE Bytes table(const char* entries, Type) {
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
  static INLINE Pair<__m256i> look_up(__m256i index, const Bytes& table) {
    const __m256i low = _mm256_shuffle_epi8(table.even, index);
    const __m256i high = _mm256_shuffle_epi8(table.odd, index);
    return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
  }

  static INLINE Pair<__m256i> values(const int16_t* x) {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }

  static INLINE Sum multiply_add(Sum sum, const Pair<__m256i>& values,
                                 const Pair<__m256i>& weights) {
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(values.even, weights.even),
                                                 _mm256_madd_epi16(values.odd, weights.odd)));
    // Else the compiler adds up in an order of its own, for which it keeps all products of a block.
    asm("" : "+x"(sum));
    return sum;
  }

  // A lane's sum fits 32 bits, that of all lanes need not.
  static INLINE void lane_sums(Sum a, Sum b, Sum c, Sum d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)),
                                      _mm256_hadd_ps(_mm256_cvtepi32_ps(c), _mm256_cvtepi32_ps(d)));
    _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

// A whole block in the order in which it is multiplied.
template <int Bits>
INLINE void order_block(const float* x, float* out) {
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

// One group of a token's activations in the order in which they are multiplied; zeros for what fills
// up its last steps.
template <int Bits>
void order_group(const char* x, Type type, int64_t first, int64_t width, int64_t padded_width,
                 float* out) {
  constexpr int kColumns = kBlockSteps<Bits> * kStep;
  const int64_t filled = (width + kStep - 1) / kStep * kStep;
  for (int64_t start = 0; start < padded_width; start += kColumns, out += kColumns) {
    if (type == kFloat32 && start + kColumns <= width) {
      order_block<Bits>(reinterpret_cast<const float*>(x) + first + start, out);
      continue;
    }
    const bool whole = filled - start >= kColumns;
    const int64_t count = whole ? kColumns : padded_width - start;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = start + (whole ? kOrder<Bits, true>[i] : kOrder<Bits, false>[i]);
      out[i] = column < width ? load(x, first + column, type) : 0.0f;
    }
  }
}

INLINE float largest_of(__m256 values) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace

void avx2_dot_integers(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                       const char* const* tables, Type type, const int16_t* const* x,
                       float* products) {
  dot<Integers>(layout, codes, rows, batch, tables, type, x, products);
}

float avx2_to_integers(const Layout& layout, const char* x, Type type, float* ordered,
                       int16_t* out) {
  const int64_t count = layout.padded(kAvx2IntegerSteps), padded_width = count / layout.groups;
  const auto order = layout.bits == 2   ? order_group<2>
                     : layout.bits == 3 ? order_group<3>
                                        : order_group<4>;
  for (int64_t g = 0; g < layout.groups; ++g)
    order(x, type, g * layout.width(), layout.width(), padded_width,
          ordered + g * padded_width);

  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 largest = _mm256_setzero_ps(), first = largest, second = largest, strange = largest;
  const auto see = [&](int64_t at, __m256& sums) ALWAYS_INLINE {
    const __m256 size = _mm256_andnot_ps(sign, _mm256_loadu_ps(ordered + at));
    largest = _mm256_max_ps(largest, size);
    sums = _mm256_add_ps(sums, size);
    // What is no number, or infinite, is none times zero.
    const __m256 zero = _mm256_mul_ps(size, _mm256_setzero_ps());
    strange = _mm256_or_ps(strange, _mm256_cmp_ps(zero, zero, _CMP_UNORD_Q));
  };
  for (int64_t j = 0; j < count; j += 16) {
    see(j, first);
    see(j + 8, second);
  }
  // A lane of a product's sum takes two neighbours of every 16.
  const float most = largest_of(_mm256_hadd_ps(first, second));
  const bool usable = _mm256_movemask_ps(strange) == 0 && std::isfinite(most);
  const IntegerScale scale(usable, largest_of(largest), most, count / 8);
  const __m256 factor = _mm256_set1_ps(scale.inverse);
  const auto whole = [&](int64_t at) ALWAYS_INLINE {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(ordered + at), factor));
  };
  for (int64_t j = 0; j < count; j += 16)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out + j),
        _mm256_permute4x64_epi64(_mm256_packs_epi32(whole(j), whole(j + 8)), 0xd8));
  return scale.value;
}

}  // namespace spallm

#endif  // __x86_64__
