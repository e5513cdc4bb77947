// The normal equations of tables under the Hessian, row by row: P^T H P and its solution.
//
// P is the one-hot matrix of a row's codes; a bucket is one entry of one of the row's tables. H P is
// made for a stripe of columns of H at a time, of several rows at once, so that H is read from near.
// H is symmetric: only the part of a stripe from its own rows on is walked, those rows at half, and the
// transpose of all is added in the end.

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace spallm {
namespace {

constexpr int64_t kStripe = 4 * kLanes;
constexpr int64_t kRows = 8;

struct Problem {
  int64_t rows, columns, groups, clusters;
  const uint8_t* codes;  // [rows, columns]
  const float* hessian;  // [columns, columns]

  int64_t buckets() const { return groups * clusters; }
  // The first bucket of a column's table.
  int64_t table_of(int64_t column) const { return column / (columns / groups) * clusters; }
};

// products[row, bucket, i] += H[j, i] for j from the stripe on, i in it.
SPALLM_LEVELS
void add_rows_of_hessian(const Problem& problem, int64_t first, int64_t rows, int64_t stripe,
                         int64_t width, Aligned* products) {
  constexpr int64_t kVectors = kStripe / kLanes;
  for (int64_t j = stripe; j < problem.columns; ++j) {
    Floats line[kVectors] = {};
    const float* from = problem.hessian + j * problem.columns + stripe;
    if (width == kStripe) __builtin_memcpy(line, from, sizeof line);
    else __builtin_memcpy(line, from, width * sizeof(float));
    if (j < stripe + width)
      for (int64_t v = 0; v < kVectors; ++v) line[v] *= 0.5f;
    const int64_t table = problem.table_of(j);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t bucket = table + problem.codes[(first + row) * problem.columns + j];
      Aligned* sum = products + (row * problem.buckets() + bucket) * kVectors;
      for (int64_t v = 0; v < kVectors; ++v) sum[v].lanes += line[v];
    }
  }
}

// normal[bucket of i, bucket] += products[bucket, i].
SPALLM_LEVELS
void gather_stripe(const Problem& problem, int64_t row, int64_t stripe, int64_t width,
                   const float* products, double* normal) {
  const int64_t buckets = problem.buckets();
  for (int64_t i = 0; i < width; ++i) {
    const int64_t column = stripe + i;
    const int64_t own = problem.table_of(column) + problem.codes[row * problem.columns + column];
    for (int64_t k = 0; k < buckets; ++k)
      normal[own * buckets + k] += static_cast<double>(products[k * kStripe + i]);
  }
}

// Solves A x = b in place (b becomes x) by Cholesky, A overwritten; false where A is not positive
// definite.
bool solve(double* a, double* b, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    double* row = a + k * n;
    for (int64_t j = 0; j <= k; ++j) {
      double sum = row[j];
      for (int64_t i = 0; i < j; ++i) sum -= row[i] * a[j * n + i];
      if (j < k) row[j] = sum / a[j * n + j];
      else if (sum > 0) row[k] = std::sqrt(sum);
      else return false;
    }
    for (int64_t i = 0; i < k; ++i) b[k] -= row[i] * b[i];
    b[k] /= row[k];
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t i = k + 1; i < n; ++i) b[k] -= a[i * n + k] * b[i];
    b[k] /= a[k * n + k];
  }
  return true;
}

struct Scratch {
  std::vector<Aligned> products;
  std::vector<double> half, normal, right;
};

void solve_rows(const Problem& problem, int64_t first, int64_t rows, float ridge,
                const float* residual, float* step, Scratch& scratch) {
  const int64_t n = problem.buckets(), columns = problem.columns;
  std::fill(scratch.half.begin(), scratch.half.end(), 0.0);
  for (int64_t stripe = 0; stripe < columns; stripe += kStripe) {
    const int64_t width = std::min(kStripe, columns - stripe);
    std::fill(scratch.products.begin(), scratch.products.end(), Aligned{});
    add_rows_of_hessian(problem, first, rows, stripe, width, scratch.products.data());
    const float* products = reinterpret_cast<const float*>(scratch.products.data());
    for (int64_t row = 0; row < rows; ++row)
      gather_stripe(problem, first + row, stripe, width, products + row * n * kStripe,
                    scratch.half.data() + row * n * n);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const double* half = scratch.half.data() + row * n * n;
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t l = 0; l < n; ++l) scratch.normal[k * n + l] = half[k * n + l] + half[l * n + k];
      double& own = scratch.normal[k * n + k];
      own = own > 0 ? own * (1 + double{ridge}) : 1;  // 1: of a bucket that no code uses
      scratch.right[k] = residual[(first + row) * n + k];
    }
    const bool solved = solve(scratch.normal.data(), scratch.right.data(), n);
    for (int64_t k = 0; k < n; ++k)
      step[(first + row) * n + k] = solved ? static_cast<float>(scratch.right[k]) : 0.0f;
  }
}

}  // namespace
}  // namespace spallm

// step [rows, groups, clusters]: the solution of (P^T H P) step = residual, its diagonal raised by
// the share `ridge`; zero for rows whose system is not positive definite.
SPALLM_EXPORT void spallm_solve_tables(const uint8_t* codes, int64_t rows, int64_t columns,
                                       int64_t groups, int32_t clusters, const float* hessian,
                                       const float* residual, float ridge, float* step) {
  using namespace spallm;
  const Problem problem{rows, columns, groups, clusters, codes, hessian};
  const int64_t buckets = problem.buckets();
#pragma omp parallel
  {
    Scratch scratch;
    scratch.products.resize(kRows * buckets * kStripe / kLanes);
    scratch.half.resize(kRows * buckets * buckets);
    scratch.normal.resize(buckets * buckets);
    scratch.right.resize(buckets);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < rows; first += kRows)
      solve_rows(problem, first, std::min(kRows, rows - first), ridge, residual, step, scratch);
  }
}
