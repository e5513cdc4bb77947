// Products of tokens in float32 with rows of a weight that is kept in bfloat16, in the vectors of
// whatever target the including file has. To be included after its target pragma.

#pragma once

#include "layout.h"

namespace spallm {
namespace {

constexpr int kDenseTokens = 4;  // whose sums stay in registers
constexpr int kDenseChains = 2;  // sums of a token, so that additions need not wait for each other

// Registers of the target, of so many bytes.
template <int Bytes>
struct DenseVector {
  static constexpr int kLanes = Bytes / 4;
  typedef float Floats __attribute__((vector_size(Bytes)));
  typedef uint32_t Words __attribute__((vector_size(Bytes)));
  typedef uint16_t Halves __attribute__((vector_size(Bytes / 2)));
};

// y[t] of one row; a token's sum does not depend on the others.
template <int Bytes, int Tokens>
void dense_row(const uint16_t* row, int64_t columns, const float* const* x, float* y) {
  using Vector = DenseVector<Bytes>;
  typename Vector::Floats sums[Tokens][kDenseChains] = {};
  int64_t j = 0;
  for (; j + kDenseChains * Vector::kLanes <= columns; j += kDenseChains * Vector::kLanes)
#pragma GCC unroll 2
    for (int c = 0; c < kDenseChains; ++c) {
      const int64_t at = j + c * Vector::kLanes;
      typename Vector::Halves halves;
      __builtin_memcpy(&halves, row + at, sizeof halves);
      const auto weights =
          (typename Vector::Floats)(__builtin_convertvector(halves, typename Vector::Words) << 16);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        typename Vector::Floats values;
        __builtin_memcpy(&values, x[t] + at, sizeof values);
        sums[t][c] += weights * values;
      }
    }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    const auto both = sums[t][0] + sums[t][1];
    float sum = 0;
    for (int lane = 0; lane < Vector::kLanes; ++lane) sum += both[lane];
    for (int64_t k = j; k < columns; ++k) sum += from_bfloat16(row[k]) * x[t][k];
    y[t] = sum;
  }
}

// See Kernels::dense_rows.
template <int Bytes>
void dense_rows(const uint16_t* row, int64_t columns, const float* x, int64_t tokens, float* y,
                int64_t y_stride) {
  using Row = void (*)(const uint16_t*, int64_t, const float* const*, float*);
  static constexpr Row kFor[] = {dense_row<Bytes, 1>, dense_row<Bytes, 2>, dense_row<Bytes, 3>,
                                 dense_row<Bytes, 4>};
  for (int64_t first = 0; first < tokens; first += kDenseTokens) {
    const int64_t count = tokens - first < kDenseTokens ? tokens - first : kDenseTokens;
    const float* values[kDenseTokens];
    float sums[kDenseTokens];
    for (int64_t t = 0; t < count; ++t) values[t] = x + (first + t) * columns;
    kFor[count - 1](row, columns, values, sums);
    for (int64_t t = 0; t < count; ++t) y[(first + t) * y_stride] = sums[t];
  }
}

}  // namespace
}  // namespace spallm
