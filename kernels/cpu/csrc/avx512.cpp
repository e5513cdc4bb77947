// AVX-512 with bfloat16 products. A table is one register and a look-up one permutation: of words
// for 3 and 4 bits (16 entries, twice), of pairs of words for 2 bits (all 16 pairs of 4 entries).
// Upper bits of an index pick one of the table's copies, so codes are shifted into place, no more.

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

#include <immintrin.h>

#include <utility>

#include "layout.h"

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace spallm {
namespace {

template <int Bits>
constexpr int kBlockSteps = Bits == 4 ? 4 : Bits == 3 ? 16 : 8;  // whole chunks' worth
template <int Bits>
constexpr int kBlockChunks = Bits == 3 ? 3 : 1;

// Bit 0 of every lane's code of a block's step, moved to bit 0 of the lane.
template <int Bits, int Step>
INLINE __m512i index(const __m512i* chunk) {
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

template <int Bits>
INLINE __m512i look_up(__m512i index, __m512i table) {
  if constexpr (Bits == 2) return _mm512_permutexvar_epi32(index, table);
  else return _mm512_permutexvar_epi16(index, table);
}

// A register to look up in, from entries that fill its low words.
template <int Bits>
INLINE __m512i spread(__m256i entries) {
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

template <int Bits>
INLINE __m512i load_table(const char* table, int64_t group, Type type) {
  constexpr int kEntries = 1 << Bits;
  constexpr __mmask16 kMask = static_cast<__mmask16>((1u << kEntries) - 1);
  const char* at = table + group * kEntries * (type == kFloat32 ? 4 : 2);
  if (type == kBfloat16) return spread<Bits>(_mm256_maskz_loadu_epi16(kMask, at));
  const __m512 values = type == kFloat32
                            ? _mm512_maskz_loadu_ps(kMask, at)
                            : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(kMask, at));
  return spread<Bits>((__m256i)_mm512_cvtneps_pbh(values));
}

// The sums of the lanes of four registers, in their order.
INLINE __m128 lane_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Rows and tokens whose products are summed at a time. One load of a token's activations serves all
// of the rows; an output has one sum, in the order of the steps.
template <int Bits, int Rows, int Tokens, bool OneSlot>
struct Tile {
  static constexpr int kTables = OneSlot ? 1 : Tokens;

  __m512i tables[Rows][kTables];
  __m512 sums[Rows][Tokens];

  template <int Step>
  INLINE void multiply(const __m512i (*chunk)[kBlockChunks<Bits>], const uint16_t* const* x,
                       int64_t column) {
    __m512i at[Rows], weights[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      at[r] = index<Bits, Step>(chunk[r]);
      weights[r] = look_up<Bits>(at[r], tables[r][0]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const __m512bh values = (__m512bh)_mm512_loadu_si512(x[t] + column + Step * kStep);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        if (!OneSlot && t > 0) weights[r] = look_up<Bits>(at[r], tables[r][t]);
        sums[r][t] = _mm512_dpbf16_ps(sums[r][t], values, (__m512bh)weights[r]);
      }
    }
  }

  // Only the first `live` steps of the block are there.
  template <int... Steps>
  INLINE void multiply_block(const uint8_t* codes, int64_t row_bytes, const uint16_t* const* x,
                             int64_t column, int live, std::integer_sequence<int, Steps...>) {
    __m512i chunk[Rows][kBlockChunks<Bits>];
    const int chunks = Bits == 3 ? (3 * live + 15) / 16 : 1;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < kBlockChunks<Bits>; ++c)
        chunk[r][c] = c < chunks ? _mm512_loadu_si512(codes + r * row_bytes + c * kChunk)
                                 : _mm512_setzero_si512();
    ((Steps < live ? multiply<Steps>(chunk, x, column) : void()), ...);
  }

  // products[t * kRowBlock + r].
  INLINE void put(float* products) const {
    constexpr int kSums = Rows * Tokens;
    const auto total = [&](int place) ALWAYS_INLINE {
      return place < kSums ? sums[place % Rows][place / Rows] : _mm512_setzero_ps();
    };
#pragma GCC unroll 4
    for (int start = 0; start < kSums; start += 4) {
      alignas(16) float four[4];
      _mm_store_ps(four, lane_sums(total(start), total(start + 1), total(start + 2),
                                   total(start + 3)));
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        if (start + k < kSums)
          products[(start + k) / Rows * kRowBlock + (start + k) % Rows] = four[k];
    }
  }
};

// products[t * kRowBlock + r] of `rows` rows, Rows at a time; a rest is left out.
template <int Bits, int Rows, int Tokens, bool OneSlot>
void dot_tiles(const Layout& layout, const uint8_t* codes, int rows, const char* const* tables,
               Type type, const uint16_t* const* x, float* products) {
  constexpr int kSteps = kBlockSteps<Bits>;
  constexpr auto kEach = std::make_integer_sequence<int, kSteps>{};
  using Sums = Tile<Bits, Rows, Tokens, OneSlot>;
  const int64_t steps = layout.steps(), chunks = layout.chunks(), row_bytes = layout.row_bytes();
  const int64_t groups = layout.groups;
  for (int row = 0; row + Rows <= rows; row += Rows, codes += Rows * row_bytes) {
    // What the next block needs: the processor's own guess ends at every page.
    const char* ahead = reinterpret_cast<const char*>(codes + rows * row_bytes);
    for (int64_t at = 0; at < Rows * row_bytes; at += kChunk) _mm_prefetch(ahead + at, _MM_HINT_T0);
    Sums tile;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) tile.sums[r][t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < Sums::kTables; ++t)
          tile.tables[r][t] = load_table<Bits>(tables[t], (row + r) * groups + g, type);
      const uint8_t* chunk = codes + g * chunks * kChunk;
      int64_t step = 0;
      for (; step + kSteps <= steps; step += kSteps, chunk += kBlockChunks<Bits> * kChunk)
        tile.multiply_block(chunk, row_bytes, x, (g * steps + step) * kStep, kSteps, kEach);
      if (step < steps)
        tile.multiply_block(chunk, row_bytes, x, (g * steps + step) * kStep,
                            static_cast<int>(steps - step), kEach);
    }
    tile.put(products + row);
  }
}

using DotTiles = void (*)(const Layout&, const uint8_t*, int, const char* const*, Type,
                          const uint16_t* const*, float*);

template <int Bits, int Rows, bool OneSlot, int... Counts>
DotTiles dot_for(int count, std::integer_sequence<int, Counts...>) {
  static constexpr DotTiles kFor[] = {dot_tiles<Bits, Rows, Counts + 1, OneSlot>...};
  return kFor[count - 1];
}

template <int Bits, int Rows, int MaxTokens, int MaxSlots>
DotTiles dot_for(const Batch& batch) {
  return batch.one_slot
             ? dot_for<Bits, Rows, true>(batch.count, std::make_integer_sequence<int, MaxTokens>{})
             : dot_for<Bits, Rows, false>(batch.count, std::make_integer_sequence<int, MaxSlots>{});
}

template <int Bits>
void dot_rows(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
              const char* const* tables, Type type, const uint16_t* const* x, float* products) {
  // A product waits for the one before in the same sum, so several sums have to be under way. They
  // are those of several rows and never parts of one: an output does not depend on what other
  // tokens are there.
  const bool few = batch.count < 3;
  const int together = few ? 4 : 2, whole = rows / together * together;
  if (whole > 0)
    (few ? dot_for<Bits, 4, 2, 2>(batch) : dot_for<Bits, 2, kMaxTokens, kMaxSlots>(batch))(
        layout, codes, whole, tables, type, x, products);
  if (whole == rows) return;
  const char* rest[kMaxTokens];
  const int64_t skipped = whole * layout.groups * layout.entries() * (type == kFloat32 ? 4 : 2);
  for (int t = 0; t < batch.count; ++t) rest[t] = tables[t] + skipped;
  dot_for<Bits, 1, kMaxTokens, kMaxSlots>(batch)(layout, codes + whole * layout.row_bytes(),
                                                 rows - whole, rest, type, x, products + whole);
}

void dot_bfloat16(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                  const char* const* tables, Type type, const uint16_t* const* x,
                  float* products) {
  const auto dot = layout.bits == 2   ? dot_rows<2>
                   : layout.bits == 3 ? dot_rows<3>
                                      : dot_rows<4>;
  dot(layout, codes, rows, batch, tables, type, x, products);
}

// The 32 indices of a step as two registers of 16, in column order.
template <int Bits, int Step>
INLINE void indices(const __m512i* chunk, __m512i& first, __m512i& second) {
  const __m512i at = index<Bits, Step>(chunk);
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
    const int chunks = Bits == 3 ? (3 * live + 15) / 16 : 1;
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
INLINE __m512 float_table(const float* entries) {
  if constexpr (Bits == 4) return _mm512_loadu_ps(entries);
  else if constexpr (Bits == 3) return _mm512_broadcast_f32x8(_mm256_loadu_ps(entries));
  else return _mm512_broadcast_f32x4(_mm_loadu_ps(entries));
}

template <int Bits, typename Store>
INLINE void decode_groups(const Layout& layout, const uint8_t* codes, const float* tables,
                          Store&& store) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const __m512 table = float_table<Bits>(tables + g * (1 << Bits));
    each_step<Bits>(
        codes + g * layout.chunks() * kChunk, layout.steps(),
        [&](int64_t step, __m512i first, __m512i second) ALWAYS_INLINE {
          store(g, step, _mm512_permutexvar_ps(first, table), _mm512_permutexvar_ps(second, table));
        },
        std::make_integer_sequence<int, kBlockSteps<Bits>>{});
  }
}

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

template <int Bits>
void decode_bfloat16_bits(const Layout& layout, const uint8_t* codes, const float* tables,
                          uint16_t* out, int64_t group_stride) {
  decode_groups<Bits>(layout, codes, tables,
                      [&](int64_t g, int64_t step, __m512 first, __m512 second) ALWAYS_INLINE {
                        uint16_t* at = out + g * group_stride + step * kStep;
                        _mm512_mask_storeu_epi16(at, columns_below(group_stride, step),
                                                 (__m512i)_mm512_cvtne2ps_pbh(second, first));
                      });
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

void decode_float32(const Layout& layout, const uint8_t* codes, const float* tables, float* out,
                    int64_t group_stride) {
  if (layout.bits == 2) decode_float32_bits<2>(layout, codes, tables, out, group_stride);
  else if (layout.bits == 3) decode_float32_bits<3>(layout, codes, tables, out, group_stride);
  else decode_float32_bits<4>(layout, codes, tables, out, group_stride);
}

void decode_bfloat16(const Layout& layout, const uint8_t* codes, const float* tables,
                     uint16_t* out, int64_t group_stride) {
  if (layout.bits == 2) decode_bfloat16_bits<2>(layout, codes, tables, out, group_stride);
  else if (layout.bits == 3) decode_bfloat16_bits<3>(layout, codes, tables, out, group_stride);
  else decode_bfloat16_bits<4>(layout, codes, tables, out, group_stride);
}

void bucket_sums(const Layout& layout, const uint8_t* codes, const float* values, float* sums) {
  if (layout.bits == 2) bucket_sums_bits<2>(layout, codes, values, sums);
  else if (layout.bits == 3) bucket_sums_bits<3>(layout, codes, values, sums);
  else bucket_sums_bits<4>(layout, codes, values, sums);
}

float dot_float32(const float* a, const float* b, int64_t count) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  int64_t j = 0;
  for (; j + 64 <= count; j += 64)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      sums[c] = _mm512_fmadd_ps(_mm512_loadu_ps(a + j + 16 * c), _mm512_loadu_ps(b + j + 16 * c),
                                sums[c]);
  for (; j < count; j += 16) {
    const __mmask16 live = count - j >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - j)) - 1);
    sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(live, a + j), _mm512_maskz_loadu_ps(live, b + j),
                              sums[0]);
  }
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace

const Kernels kAvx512 = {
    "avx512", dot_bfloat16, decode_float32, decode_bfloat16, dot_float32, bucket_sums,
};

}  // namespace spallm

#endif  // __x86_64__
