// Sums of outer products of bfloat16 activations, in float32: sum[i, j] += sum over t of
// a[t, i] * b[t, j].
//
// Activations are exact in bfloat16, so the instruction that multiplies pairs of them and adds in
// float32 loses nothing against converting them first, and is twice as fast. Of a Hessian (a = b)
// only the upper half is made.

#include <algorithm>
#include <vector>

#include "lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define SPALLM_BF16 __attribute__((target("avx512f,avx512bf16,prefer-vector-width=512")))

namespace spallm {
namespace {

constexpr int64_t kPairs = 256;      // of tokens, packed at a time
constexpr int64_t kTileRows = 8;     // with three vectors of columns, 24 sums in registers
constexpr int64_t kTileVectors = 3;

// Pairs of tokens beside each other, columns in panels of a vector's width: [panel, pair, lane].
struct Packed {
  int64_t pairs;
  const uint32_t* words;

  const uint32_t* panel(int64_t index) const { return words + index * pairs * kLanes; }
};

void pack_panel(const uint16_t* activations, int64_t tokens, int64_t columns, int64_t panel,
                uint32_t* words) {
  const int64_t first = panel * kLanes, lanes = std::min<int64_t>(kLanes, columns - first);
  for (int64_t token = 0; token < tokens; token += 2, words += kLanes) {
    const uint16_t* even = activations + token * columns + first;
    const uint16_t* odd = even + columns;
    const bool has_odd = token + 1 < tokens;
    for (int64_t lane = 0; lane < lanes; ++lane)
      words[lane] = even[lane] | (has_odd ? static_cast<uint32_t>(odd[lane]) << 16 : 0);
    std::fill(words + lanes, words + kLanes, 0u);
  }
}

// Adds the products of up to eight columns of a with up to three panels of b.
template <int kVectors>
SPALLM_BF16 void add_tile(const Packed& a, int64_t row, int64_t rows, const Packed& b,
                          int64_t panel, float* sum, int64_t columns) {
  __m512 sums[kTileRows][kVectors];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
  const uint32_t* left = a.panel(row / kLanes) + row % kLanes;
  for (int64_t pair = 0; pair < a.pairs; ++pair) {
    __m512bh right[kVectors];
    for (int v = 0; v < kVectors; ++v)
      right[v] = (__m512bh)_mm512_loadu_si512(b.panel(panel + v) + pair * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[pair * kLanes + i]));
      for (int v = 0; v < kVectors; ++v)
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], one, right[v]);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = (panel + v) * kLanes;
      const int64_t lanes = std::min<int64_t>(kLanes, columns - column);
      const __mmask16 mask = static_cast<__mmask16>((1u << lanes) - 1);
      float* to = sum + (row + i) * columns + column;
      _mm512_mask_storeu_ps(
          to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[i][v]));
    }
}

void add_panels(const Packed& a, const Packed& b, int64_t panel, int64_t vectors, int64_t rows,
                float* sum, int64_t columns) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t some = std::min(kTileRows, rows - row);
    if (vectors == 3) add_tile<3>(a, row, some, b, panel, sum, columns);
    else if (vectors == 2) add_tile<2>(a, row, some, b, panel, sum, columns);
    else add_tile<1>(a, row, some, b, panel, sum, columns);
  }
}

}  // namespace
}  // namespace spallm
#endif

SPALLM_EXPORT int32_t spallm_multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// a, b: bfloat16 [tokens, columns]; sum: float32 [columns, columns]. Where a and b are one tensor,
// only sums at or above the diagonal are right.
SPALLM_EXPORT void spallm_add_products(const uint16_t* a, const uint16_t* b, int64_t tokens,
                                       int64_t columns, float* sum) {
#if defined(__x86_64__)
  using namespace spallm;
  const int64_t panels = (columns + kLanes - 1) / kLanes;
  const int64_t strips = (panels + kTileVectors - 1) / kTileVectors;
  const int64_t words = panels * kPairs * kLanes;
  const bool symmetric = a == b;
  std::vector<uint32_t> packed(symmetric ? words : 2 * words);
  uint32_t* packed_b = packed.data() + (symmetric ? 0 : words);
  for (int64_t token = 0; token < tokens; token += 2 * kPairs) {
    const int64_t some = std::min(2 * kPairs, tokens - token), pairs = (some + 1) / 2;
    const Packed left{pairs, packed.data()}, right{pairs, packed_b};
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t at = panel * pairs * kLanes;
        pack_panel(a + token * columns, some, columns, panel, packed.data() + at);
        if (!symmetric) pack_panel(b + token * columns, some, columns, panel, packed_b + at);
      }
      // From the right, where the upper half has most rows: the short strips come last.
#pragma omp for schedule(dynamic)
      for (int64_t strip = strips - 1; strip >= 0; --strip) {
        const int64_t panel = strip * kTileVectors;
        const int64_t vectors = std::min(kTileVectors, panels - panel);
        const int64_t stop = std::min(columns, (panel + vectors) * kLanes);
        add_panels(left, right, panel, vectors, symmetric ? stop : columns, sum, columns);
      }
    }
  }
#else
  (void)a, (void)b, (void)tokens, (void)columns, (void)sum;
#endif
}
