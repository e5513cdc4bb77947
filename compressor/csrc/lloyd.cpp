// Weighted one-dimensional Lloyd, a row at a time; the same steps as in lloyd.py, where their
// reasons are.

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace spallm {
namespace {

constexpr int kStarts = 3;

// A row in ascending order, with prefix sums of its weights and weighted values.
struct Row {
  std::vector<uint64_t> keys;
  std::vector<float> values, weights;
  std::vector<double> mass, moment;

  explicit Row(int64_t columns)
      : keys(columns), values(columns), weights(columns), mass(columns + 1), moment(columns + 1) {}

  void load(const float* row, const float* column_weights) {
    const int64_t columns = static_cast<int64_t>(values.size());
    // The bits of a float, turned so that they order like the numbers, then the column.
    for (int64_t i = 0; i < columns; ++i) {
      uint32_t word;
      __builtin_memcpy(&word, row + i, sizeof word);
      word ^= word >> 31 ? 0xffffffffu : 0x80000000u;
      keys[i] = static_cast<uint64_t>(word) << 32 | static_cast<uint64_t>(i);
    }
    std::sort(keys.begin(), keys.end());
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t column = static_cast<uint32_t>(keys[i]);
      values[i] = row[column];
      weights[i] = column_weights[column];
      mass[i + 1] = mass[i] + weights[i];
      moment[i + 1] = moment[i] + static_cast<double>(weights[i]) * values[i];
    }
  }

  // How many values are less; without branches, which would be guessed wrong half of the time.
  int64_t count_less(float bound) const {
    const float* base = values.data();
    int64_t left = static_cast<int64_t>(values.size());
    while (left > 1) {
      const int64_t half = left / 2;
      base += base[half - 1] < bound ? half : 0;
      left -= half;
    }
    return base - values.data() + (*base < bound);
  }
};

// The row's values at some positions, as dense as the best points are (Panter and Dite 1951).
void companded_start(const Row& row, int64_t density_points, int clusters,
                     std::vector<double>& spread, float* centers) {
  const int64_t columns = static_cast<int64_t>(row.values.size());
  const int64_t stride = std::max<int64_t>(1, columns / density_points);
  const int64_t points = (columns + stride - 1) / stride;
  spread.assign(points, 0.0);
  for (int64_t i = 1; i < points; ++i) {
    const int64_t left = (i - 1) * stride, right = i * stride;
    const double gap = static_cast<double>(row.values[right]) - row.values[left];
    const double weight = (static_cast<double>(row.weights[left]) + row.weights[right]) / 2;
    spread[i] = spread[i - 1] + std::cbrt(gap * gap * weight);
  }
  for (int k = 0; k < clusters; ++k) {
    const double wanted = (k + 0.5) / clusters * spread.back();
    const int64_t at = std::lower_bound(spread.begin(), spread.end(), wanted) - spread.begin();
    centers[k] = row.values[std::min(at, points - 1) * stride];
  }
}

void make_starts(const Row& row, int64_t density_points, int clusters, std::vector<double>& spread,
                 float (*starts)[kMaxClusters]) {
  const int64_t columns = static_cast<int64_t>(row.values.size());
  const float low = row.values.front(), high = row.values.back();
  for (int k = 0; k < clusters; ++k) {
    starts[0][k] = low + (high - low) * (static_cast<float>(k) / static_cast<float>(clusters - 1));
    starts[1][k] = row.values[static_cast<int64_t>((k + 0.5) / clusters * columns)];
  }
  companded_start(row, density_points, clusters, spread, starts[2]);
}

// Position of each center's interval among the values: [edges[k], edges[k + 1]).
void find_edges(const Row& row, const float* centers, int clusters, int64_t* edges) {
  edges[0] = 0;
  for (int k = 1; k < clusters; ++k)
    edges[k] = row.count_less((centers[k] + centers[k - 1]) / 2);
  edges[clusters] = static_cast<int64_t>(row.values.size());
}

void iterate(const Row& row, int clusters, int iterations, float* centers) {
  int64_t edges[kMaxClusters + 1];
  for (int step = 0; step < iterations; ++step) {
    find_edges(row, centers, clusters, edges);
    bool changed = false;
    for (int k = 0; k < clusters; ++k) {
      const double mass = row.mass[edges[k + 1]] - row.mass[edges[k]];
      if (!(mass > 0)) continue;  // an empty cluster keeps its value
      const double mean = (row.moment[edges[k + 1]] - row.moment[edges[k]]) / mass;
      // A cluster with next to no weight may lose its mean to cancellation.
      const float center =
          std::clamp(static_cast<float>(mean), row.values.front(), row.values.back());
      changed |= center != centers[k];
      centers[k] = center;
    }
    if (!changed) break;
  }
  std::sort(centers, centers + clusters);
}

// What the centers take off the weighted sum of squares.
double explained(const Row& row, const float* centers, int clusters) {
  int64_t edges[kMaxClusters + 1];
  find_edges(row, centers, clusters, edges);
  double sum = 0;
  for (int k = 0; k < clusters; ++k) {
    const double center = centers[k];
    const double mass = row.mass[edges[k + 1]] - row.mass[edges[k]];
    sum += 2 * center * (row.moment[edges[k + 1]] - row.moment[edges[k]]) - center * center * mass;
  }
  return sum;
}

}  // namespace
}  // namespace spallm

// tables [rows, clusters] of values [rows, columns] under weights [columns].
SPALLM_EXPORT void spallm_lloyd(const float* values, const float* weights, int64_t rows,
                                int64_t columns, int32_t clusters, int32_t trial_iterations,
                                int32_t iterations, int64_t density_points, float* tables) {
  using namespace spallm;
#pragma omp parallel
  {
    Row row(columns);
    std::vector<double> spread;
#pragma omp for schedule(dynamic, 16)
    for (int64_t r = 0; r < rows; ++r) {
      row.load(values + r * columns, weights);
      float centers[kStarts][kMaxClusters];
      make_starts(row, density_points, clusters, spread, centers);
      int best = 0;
      double most = 0;
      for (int start = 0; start < kStarts; ++start) {
        iterate(row, clusters, trial_iterations, centers[start]);
        const double gain = explained(row, centers[start], clusters);
        if (start == 0 || gain > most) {
          best = start;
          most = gain;
        }
      }
      iterate(row, clusters, iterations, centers[best]);
      std::copy_n(centers[best], clusters, tables + r * clusters);
    }
  }
}
