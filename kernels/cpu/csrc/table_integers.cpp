// Tables as integers of 16 or of 8 bits: one scale for each row, see kernels/cpu/integers.py.

#include <cfloat>
#include <cmath>

#include "integers.h"
#include "layout.h"
#include "numbers.h"

namespace spallm {
namespace {

// Added to what is smaller than 2^22 and taken away again, it leaves the nearest integer, of two the
// even one.
constexpr float kRound = 0x1.8p23f;

// What 8 bits round away depends on where a row's entries lie between the steps, by chance: of so many
// scales the best rounds away a fifth less, squared, than the finest.
constexpr int kScales = 16;
struct Scales {
  float largest[kScales], unit[kScales];  // what a row's largest entry becomes; beside the finest, squared
};
constexpr Scales kTried = [] {
  Scales all{};
  for (int s = 0; s < kScales; ++s) {
    all.largest[s] = kLargestByte - 1.5f * static_cast<float>(s);
    const float unit = kLargestByte / all.largest[s];
    all.unit[s] = unit * unit;
  }
  return all;
}();

// The product is to be rounded before anything is added, as everywhere else.
#if defined(__GNUC__) && !defined(__clang__)
#define ROUND_EACH __attribute__((optimize("fp-contract=off")))
#else
#define ROUND_EACH
#endif
// Each processor takes the one for its instructions, where the loader can choose.
#if defined(__GLIBC__) && !defined(__clang__) && defined(__x86_64__) && !defined(SPALLM_ONE_LEVEL)
#define FOR_EACH_LEVEL __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_LEVEL
#endif

// What the largest entry of a row should be.
FOR_EACH_LEVEL ROUND_EACH float best_largest(const float* row, int64_t entries, float most) {
  const float inverse = 1.0f / most;
  // A vector of all scales: left to itself the compiler makes one of entries, and adds up its lanes.
  typedef float EachScale __attribute__((vector_size(kScales * sizeof(float))));
  EachScale largest, away = {};
  __builtin_memcpy(&largest, kTried.largest, sizeof largest);
  for (int64_t k = 0; k < entries; ++k) {
    const EachScale product = row[k] * inverse * largest;
    const EachScale rest = product - (product + kRound - kRound);
    away += rest * rest;
  }
  int best = 0;
  for (int s = 1; s < kScales; ++s)
    if (away[s] * kTried.unit[s] < away[best] * kTried.unit[best]) best = s;
  return kTried.largest[best];
}

// The scale of a row.
template <typename Integer>
ROUND_EACH float row_to_integers(const float* row, int64_t entries, Integer* integers) {
  constexpr bool kBytes = sizeof(Integer) == 1;
  constexpr float kLargest = kBytes ? kLargestByte : kLargestWord;
  // Without their signs numbers are ordered as the integers of the same bits, with what is no number
  // behind all others.
  int32_t bits = 0;
  for (int64_t k = 0; k < entries; ++k) {
    const int32_t size = static_cast<int32_t>(float_to_bits(row[k]) & 0x7fffffffu);
    bits = size > bits ? size : bits;
  }
  const float most = bits_to_float(static_cast<uint32_t>(bits));
  float scale = most / kLargest;
  // The inverse of what is smaller would be infinite; nor does one of what is no number help.
  const bool usable = scale > FLT_MIN && scale < INFINITY;
  if (usable && kBytes) scale = most / best_largest(row, entries, most);
  const float inverse = usable ? 1.0f / scale : 0.0f;
  for (int64_t k = 0; k < entries; ++k) {
    const float product = row[k] * inverse;
    const float whole = product + kRound - kRound;
    integers[k] = usable ? static_cast<Integer>(whole) : 0;
  }
  return scale <= FLT_MIN ? 0.0f : scale;
}

}  // namespace
}  // namespace spallm

#pragma GCC visibility push(default)
extern "C" {

// type: kWord or kByte.
void spallm_tables_to_integers(const float* tables, int64_t rows, int64_t entries, int32_t type,
                               void* integers, float* scales) {
  using namespace spallm;
  for (int64_t r = 0; r < rows; ++r, tables += entries)
    scales[r] = type == kByte
                    ? row_to_integers(tables, entries, static_cast<int8_t*>(integers) + r * entries)
                    : row_to_integers(tables, entries, static_cast<int16_t*>(integers) + r * entries);
}

}  // extern "C"
#pragma GCC visibility pop
