// AVX2, products in float32. Eight entries fit a register; sixteen take two look-ups and a choice by
// the code's highest bit. A step is multiplied in two halves of sixteen columns, each the even ones
// and then the odd ones, which is how codes lie in the two halves of a word.

#if defined(__x86_64__)
#include "layout.h"
#include "numbers.h"

#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "dense.h"
#include "tile.h"

namespace spallm {
namespace {

constexpr int kLanes = 8;

template <int Bits>
struct FloatTable {
  __m256 low, high;  // of 16 entries; else all are in `low`

  // Bits of an index above the code's own do not matter.
  INLINE __m256 look_up(__m256i index) const {
    const __m256 below = _mm256_permutevar8x32_ps(low, index);
    if constexpr (Bits != 4) return below;
    const __m256 above = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};

INLINE __m256 load_eight(const char* entries, Type type) {
  if (type == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(entries));
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries));
  if (type == kFloat16) return _mm256_cvtph_ps(words);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

// Four entries, twice.
INLINE __m256 load_four(const char* entries, Type type) {
  if (type == kFloat32) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(entries));
  int64_t words;
  __builtin_memcpy(&words, entries, sizeof words);
  alignas(16) const int64_t twice[2] = {words, words};
  return load_eight(reinterpret_cast<const char*>(twice), type);
}

template <int Bits>
INLINE FloatTable<Bits> load_table(const char* entries, Type type) {
  const __m256 low = Bits == 2 ? load_four(entries, type) : load_eight(entries, type);
  return {low, Bits == 4 ? load_eight(entries + 8 * size_of(type), type) : low};
}

using Floats = Pair<__m256>;

struct Float32 {
  using X = float;
  using Values = Floats;
  using Sum = __m256;
  using Codes = const uint8_t*;
  template <int Bits>
  using Index = __m256i;
  template <int Bits>
  using Table = FloatTable<Bits>;
  template <int Bits>
  using Weights = Floats;
  static constexpr int kUnitSteps = 1, kStepsTogether = 1, kParts = 2, kPartColumns = 2 * kLanes;
  static constexpr int kFewTokens = 2, kFewRows = 2, kManyRows = 1;
  static constexpr bool kSlotsInSpans = false;
  static constexpr int64_t kCacheBytes = 48 << 10, kSpanBytes = 24 << 10;

  static INLINE Sum zero() { return _mm256_setzero_ps(); }
  static INLINE Codes codes(const uint8_t* at) { return at; }

  template <int Bits, int Step, int Part, bool Whole>
  static INLINE __m256i index(const Codes* chunk) {
    const auto words = [&](int number) ALWAYS_INLINE {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk[number] + 32 * Part));
    };
    if constexpr (Bits == 2) {
      return _mm256_srli_epi32(words(0), 4 * Step);
    } else {
      constexpr int kBit = Bits * Step, kWord = kBit / 16, kShift = kBit % 16;
      const __m256i low = _mm256_srli_epi16(words(kWord), kShift);
      if constexpr (kShift + Bits > 16)
        return _mm256_or_si256(low, _mm256_slli_epi16(words(kWord + 1), 16 - kShift));
      else
        return low;
    }
  }

  template <int Bits>
  static INLINE FloatTable<Bits> table(const char* entries, Type type) {
    return load_table<Bits>(entries, type);
  }

  template <int Bits>
  static INLINE Floats look_up(__m256i index, const FloatTable<Bits>& table) {
    const __m256i odd = _mm256_srli_epi32(index, Bits == 2 ? 2 : 16);
    return {table.look_up(index), table.look_up(odd)};
  }

  static INLINE Floats values(const float* x) {
    return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + kLanes)};
  }

  static INLINE __m256 multiply_add(__m256 sum, const Floats& values, const Floats& weights) {
    return _mm256_fmadd_ps(values.odd, weights.odd,
                           _mm256_fmadd_ps(values.even, weights.even, sum));
  }

  // The sums of the lanes of four registers, in their order.
  static INLINE void lane_sums(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_store_ps(out,
                 _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

// The weights of one step in column order, from Step on: they are 32 floats.
template <int Bits, int Step>
INLINE void decode_step(const uint8_t* const* chunk, const FloatTable<Bits>& table, float* out) {
  const auto half = [&](__m256i index, float* at) ALWAYS_INLINE {
    const Floats weights = Float32::look_up<Bits>(index, table);
    const __m256 low = _mm256_unpacklo_ps(weights.even, weights.odd);
    const __m256 high = _mm256_unpackhi_ps(weights.even, weights.odd);
    _mm256_storeu_ps(at, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(at + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
  };
  half(Float32::index<Bits, Step, 0, true>(chunk), out);
  half(Float32::index<Bits, Step, 1, true>(chunk), out + 2 * kLanes);
}

template <int Bits, typename Out, typename Store, int... Steps>
INLINE void decode_groups(const Layout& layout, const uint8_t* codes, const float* tables, Out* out,
                          int64_t group_stride, Store&& store,
                          std::integer_sequence<int, Steps...>) {
  constexpr int kBlockColumns = kBlockSteps<Bits> * kStep;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const uint8_t* group = codes + g * layout.chunks() * kChunk;
    const auto table =
        load_table<Bits>(reinterpret_cast<const char*>(tables + g * layout.entries()), kFloat32);
    for (int64_t start = 0; start < group_stride; start += kBlockColumns) {
      const int64_t left = group_stride - start;
      const uint8_t* chunk[kBlockChunks<Bits>];
      for (int c = 0; c < kBlockChunks<Bits>; ++c) chunk[c] = group + c * kChunk;
      group += kBlockChunks<Bits> * kChunk;
      float weights[kBlockColumns];
      ((Steps * kStep < left
            ? decode_step<Bits, Steps>(chunk, table, weights + Steps * kStep)
            : void()),
       ...);
      store(weights, out + g * group_stride + start, left < kBlockColumns ? left : kBlockColumns);
    }
  }
}

template <typename Out, typename Store>
INLINE void decode(const Layout& layout, const uint8_t* codes, const float* tables, Out* out,
                   int64_t group_stride, Store&& store) {
  const auto with = [&](auto bits) ALWAYS_INLINE {
    constexpr int kBits = decltype(bits)::value;
    decode_groups<kBits>(layout, codes, tables, out, group_stride, store,
                         std::make_integer_sequence<int, kBlockSteps<kBits>>{});
  };
  if (layout.bits == 2) with(std::integral_constant<int, 2>{});
  else if (layout.bits == 3) with(std::integral_constant<int, 3>{});
  else with(std::integral_constant<int, 4>{});
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

}  // namespace

const Kernels kAvx2 = {
    kLanes, nullptr, dot<Float32>, &kAvx2Words, &kAvx2Bytes,
    decode_float32, decode_bfloat16, scalar_bucket_sums, dense_rows<32>,
};

}  // namespace spallm

#endif  // __x86_64__
