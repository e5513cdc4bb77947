// The C interface of products with a weight that is kept in bfloat16: what Python calls, and checks.

#include <omp.h>

#include "layout.h"

using namespace spallm;

#pragma GCC visibility push(default)
extern "C" {

// y[t, r] = sum_j weight[r, j] x[t, j], all of it in float32 but the weight.
void spallm_dense_linear(const uint16_t* weight, int64_t rows, int64_t columns, const float* x,
                         int64_t tokens, float* y, int32_t level) {
  const Kernels& with = kernels(level);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns * tokens, rows))
  for (int64_t row = 0; row < rows; ++row)
    with.dense_rows(weight + row * columns, columns, x, tokens, y + row, rows);
}

}  // extern "C"
#pragma GCC visibility pop
