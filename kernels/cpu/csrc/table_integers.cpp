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

template <typename Integer>
#if defined(__GNUC__) && !defined(__clang__)
// The product is to be rounded before anything is added, as everywhere else.
__attribute__((optimize("fp-contract=off")))
#endif
// The scale of a row.
float row_to_integers(const float* row, int64_t entries, float largest, Integer* integers) {
  // Without their signs numbers are ordered as the integers of the same bits, with what is no number
  // behind all others.
  int32_t most = 0;
  for (int64_t k = 0; k < entries; ++k) {
    const int32_t size = static_cast<int32_t>(float_to_bits(row[k]) & 0x7fffffffu);
    most = size > most ? size : most;
  }
  const float scale = bits_to_float(static_cast<uint32_t>(most)) / largest;
  // The inverse of what is smaller would be infinite; nor does one of what is no number help.
  const bool usable = scale > FLT_MIN && scale < INFINITY;
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
    scales[r] = type == kByte ? row_to_integers(tables, entries, kLargestByte,
                                                static_cast<int8_t*>(integers) + r * entries)
                              : row_to_integers(tables, entries, kLargestWord,
                                                static_cast<int16_t*>(integers) + r * entries);
}

}  // extern "C"
#pragma GCC visibility pop
