// What the files of AVX-512 kernels share. To be included after their target pragma.

#pragma once

#include <immintrin.h>

#include "layout.h"
#include "tile.h"

namespace spallm {

// Without bfloat16 instructions; both levels have them in common.
void avx512_dot_float32(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                        const char* const* tables, Type type, const float* const* x,
                        float* products);
void avx512_decode_float32(const Layout& layout, const uint8_t* codes, const float* tables,
                           float* out, int64_t group_stride);
void avx512_bucket_sums(const Layout& layout, const uint8_t* codes, const float* values,
                        float* sums);
void avx512_dense_rows(const uint16_t* row, int64_t columns, const float* x, int64_t tokens,
                       float* y, int64_t y_stride);

namespace {

// The same in a register. Left to itself the compiler loads a token's activations anew for every row,
// and adds up in an order of its own, for which it puts sums into memory.
template <typename Register>
INLINE Register kept(Register value) {
  asm("" : "+v"(value));
  return value;
}

// Bit 0 of every lane's code of a block's step, moved to bit 0 of the lane.
template <int Bits, int Step>
INLINE __m512i lane_index(const __m512i* chunk) {
  if constexpr (Bits == 2) {
    return _mm512_srli_epi32(chunk[0], 4 * Step);
  } else {
    constexpr int kBit = Bits * Step, kWord = kBit / 16, kShift = kBit % 16;
    const __m512i low = _mm512_srli_epi16(chunk[kWord], kShift);
    if constexpr (kShift + Bits > 16)
      return _mm512_or_si512(low, _mm512_slli_epi16(chunk[kWord + 1], 16 - kShift));
    else
      return low;
  }
}

// What all arithmetic in 512 bits has in common.
struct Avx512 {
  using Sum = __m512;
  using Codes = __m512i;
  template <int Bits>
  using Index = __m512i;
  static constexpr int kUnitSteps = 1, kStepsTogether = 1, kParts = 1, kPartColumns = kStep;
  static constexpr int kFewTokens = 2, kFewRows = 4, kManyRows = 2;
  static constexpr bool kSlotsInSpans = false;
  static constexpr int64_t kCacheBytes = 48 << 10, kSpanBytes = 24 << 10;

  static INLINE Sum zero() { return _mm512_setzero_ps(); }
  static INLINE Codes codes(const uint8_t* at) { return _mm512_loadu_si512(at); }

  template <int Bits, int Step, int Part, bool Whole>
  static INLINE __m512i index(const __m512i* chunk) {
    return lane_index<Bits, Step>(chunk);
  }

  // The sums of the lanes of four registers, in their order.
  static INLINE void lane_sums(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_store_ps(out,
                 _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

// The 32 indices of a step as two registers of 16, in column order.
template <int Bits, int Step>
INLINE void indices(const __m512i* chunk, __m512i& first, __m512i& second) {
  const __m512i at = lane_index<Bits, Step>(chunk);
  if constexpr (Bits == 2) {
    const __m512i odd = _mm512_srli_epi32(at, 2);
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high =
        _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    first = _mm512_permutex2var_epi32(at, low, odd);
    second = _mm512_permutex2var_epi32(at, high, odd);
  } else {
    first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(at));
    second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(at, 1));
  }
}

// Calls use(step, first, second) for every step of a group.
template <int Bits, typename Use, int... Steps>
INLINE void each_step(const uint8_t* codes, int64_t steps, Use&& use,
                      std::integer_sequence<int, Steps...>) {
  for (int64_t start = 0; start < steps; start += kBlockSteps<Bits>) {
    const int live = static_cast<int>(
        steps - start < kBlockSteps<Bits> ? steps - start : kBlockSteps<Bits>);
    const int chunks = live_chunks<Bits>(live);
    __m512i chunk[kBlockChunks<Bits>];
    for (int c = 0; c < kBlockChunks<Bits>; ++c)
      chunk[c] = c < chunks ? _mm512_loadu_si512(codes + c * kChunk) : _mm512_setzero_si512();
    codes += kBlockChunks<Bits> * kChunk;
    const auto one = [&](auto step) ALWAYS_INLINE {
      constexpr int kStepIndex = decltype(step)::value;
      if (kStepIndex >= live) return;
      __m512i first, second;
      indices<Bits, kStepIndex>(chunk, first, second);
      use(start + kStepIndex, first, second);
    };
    (one(std::integral_constant<int, Steps>{}), ...);
  }
}

// How many of a step's columns are below a limit, as a mask.
INLINE __mmask32 columns_below(int64_t limit, int64_t step) {
  const int64_t left = limit - step * kStep;
  return left >= kStep ? 0xffffffffu : (1u << left) - 1u;
}

// Four entries four times, eight twice: a look-up uses the low four bits of an index.
template <int Bits>
INLINE __m512 spread_floats(__m512 entries) {
  if constexpr (Bits == 4) return entries;
  else if constexpr (Bits == 3) return _mm512_broadcast_f32x8(_mm512_castps512_ps256(entries));
  else return _mm512_broadcast_f32x4(_mm512_castps512_ps128(entries));
}

// Entries of 16 bits that fill the low words, as look-ups of words find them: 16 twice, eight four
// times, and of four all 16 pairs, of which 2 bits look up one at a time.
template <int Bits>
INLINE __m512i spread_words(__m256i entries) {
  if constexpr (Bits == 4) {
    return _mm512_broadcast_i64x4(entries);
  } else if constexpr (Bits == 3) {
    return _mm512_broadcast_i32x4(_mm256_castsi256_si128(entries));
  } else {
    const __m512i pairs = _mm512_set_epi16(3, 3, 3, 2, 3, 1, 3, 0, 2, 3, 2, 2, 2, 1, 2, 0, 1, 3, 1,
                                           2, 1, 1, 1, 0, 0, 3, 0, 2, 0, 1, 0, 0);
    return _mm512_permutexvar_epi16(pairs, _mm512_castsi256_si512(entries));
  }
}

// The entries of a table, whatever their type, as floats in the low lanes; zeros above.
template <int Bits>
INLINE __m512 load_floats(const char* table, Type type) {
  constexpr __mmask16 kMask = static_cast<__mmask16>((1u << (1 << Bits)) - 1);
  if (type == kFloat32) return _mm512_maskz_loadu_ps(kMask, table);
  const __m256i words = _mm256_maskz_loadu_epi16(kMask, table);
  if (type == kFloat16) return _mm512_cvtph_ps(words);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// Calls store(group, step, first half, second half) with the weights of every step of a row.
template <int Bits, typename Store>
INLINE void decode_groups(const Layout& layout, const uint8_t* codes, const float* tables,
                          Store&& store) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const char* entries = reinterpret_cast<const char*>(tables + g * (1 << Bits));
    const __m512 table = spread_floats<Bits>(load_floats<Bits>(entries, kFloat32));
    each_step<Bits>(
        codes + g * layout.chunks() * kChunk, layout.steps(),
        [&](int64_t step, __m512i first, __m512i second) ALWAYS_INLINE {
          store(g, step, _mm512_permutexvar_ps(first, table), _mm512_permutexvar_ps(second, table));
        },
        std::make_integer_sequence<int, kBlockSteps<Bits>>{});
  }
}

// A row in bfloat16. `narrow` makes 32 words of two registers.
template <int Bits, typename Narrow>
INLINE void decode_bfloat16_bits(const Layout& layout, const uint8_t* codes, const float* tables,
                                 uint16_t* out, int64_t group_stride, Narrow&& narrow) {
  decode_groups<Bits>(layout, codes, tables,
                      [&](int64_t g, int64_t step, __m512 first, __m512 second) ALWAYS_INLINE {
                        _mm512_mask_storeu_epi16(out + g * group_stride + step * kStep,
                                                 columns_below(group_stride, step),
                                                 narrow(first, second));
                      });
}

}  // namespace
}  // namespace spallm
