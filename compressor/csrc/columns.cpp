// Rounding with error feedback and coordinate descent inside a block of columns.

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace spallm {
namespace {

constexpr int kBlockColumns = 128;

// What the walks over a block share.
struct Block {
  int64_t rows, columns, start, width, groups;
  int clusters;
  const int64_t* group_of;  // [columns]
  const float* tables;      // [rows, groups, clusters], ascending
  uint8_t* codes;           // [rows, columns]
};

struct Tile {
  int64_t first, rows;  // rows of the matrix
  Floats values[kBlockColumns];
  Floats changes[kBlockColumns];
  Ints codes[kBlockColumns];
  std::vector<Aligned> entries, midpoints;  // [groups, clusters]
};

SPALLM_INLINE void load_tables(const Block& block, Tile& tile) {
  const int64_t all = block.groups * block.clusters;
  for (int64_t lane = 0; lane < tile.rows; ++lane) {
    const float* table = block.tables + (tile.first + lane) * all;
    for (int64_t k = 0; k < all; ++k) {
      tile.entries[k].lanes[lane] = table[k];
      // Of the last entry of a table nothing reads the midpoint.
      tile.midpoints[k].lanes[lane] = k + 1 < all ? (table[k] + table[k + 1]) / 2 : 0.0f;
    }
  }
}

SPALLM_INLINE void load_columns(const float* from, int64_t stride, const Tile& tile, int64_t width,
                                Floats* to) {
  for (int64_t lane = 0; lane < tile.rows; ++lane)
    for (int64_t i = 0; i < width; ++i) to[i][lane] = from[(tile.first + lane) * stride + i];
}

SPALLM_INLINE void store_columns(const Floats* from, const Tile& tile, int64_t width, float* to,
                                 int64_t stride) {
  for (int64_t lane = 0; lane < tile.rows; ++lane)
    for (int64_t i = 0; i < width; ++i) to[(tile.first + lane) * stride + i] = from[i][lane];
}

SPALLM_INLINE void store_codes(const Block& block, const Tile& tile) {
  for (int64_t lane = 0; lane < tile.rows; ++lane) {
    uint8_t* row = block.codes + (tile.first + lane) * block.columns + block.start;
    for (int64_t i = 0; i < block.width; ++i) row[i] = static_cast<uint8_t>(tile.codes[i][lane]);
  }
}

// The entry nearest to each wanted value, and its code.
SPALLM_INLINE void find_nearest(const Block& block, const Tile& tile, int64_t column,
                                const Floats& wanted, Floats& chosen, Ints& code) {
  const int64_t table = block.group_of[column] * block.clusters;
  const Aligned* entries = tile.entries.data() + table;
  const Aligned* midpoints = tile.midpoints.data() + table;
  chosen = entries[0].lanes;
  code = Ints{};
  for (int k = 1; k < block.clusters; ++k) {
    const Ints above = wanted > midpoints[k - 1].lanes;  // -1 where true
    chosen = above ? entries[k].lanes : chosen;
    code -= above;
  }
}

SPALLM_LEVELS
void round_tile(const Block& block, Tile& tile, float* work, const float* factor, float* errors) {
  load_tables(block, tile);
  load_columns(work + block.start, block.columns, tile, block.width, tile.values);
  for (int64_t i = 0; i < block.width; ++i) {
    const int64_t column = block.start + i;
    const float* row = factor + column * block.columns + block.start;
    Floats chosen;
    find_nearest(block, tile, column, tile.values[i], chosen, tile.codes[i]);
    const Floats error = (tile.values[i] - chosen) / row[i];
    tile.changes[i] = error;
    for (int64_t j = i + 1; j < block.width; ++j) tile.values[j] -= error * row[j];
  }
  store_codes(block, tile);
  store_columns(tile.changes, tile, block.width, errors, block.width);
}

SPALLM_LEVELS
void descend_tile(const Block& block, Tile& tile, float* approximation, const float* gradient,
                  const float* hessian, float* changes) {
  load_tables(block, tile);
  Floats current[kBlockColumns];
  load_columns(approximation + block.start, block.columns, tile, block.width, current);
  load_columns(gradient + block.start, block.columns, tile, block.width, tile.values);
  for (int64_t i = 0; i < block.width; ++i) {
    const int64_t column = block.start + i;
    const float* row = hessian + column * block.columns + block.start;
    const Floats wanted = current[i] - tile.values[i] / row[i];
    Floats chosen;
    find_nearest(block, tile, column, wanted, chosen, tile.codes[i]);
    const Floats change = chosen - current[i];
    tile.changes[i] = change;
    current[i] = chosen;
    for (int64_t j = i + 1; j < block.width; ++j) tile.values[j] += change * row[j];
  }
  store_codes(block, tile);
  store_columns(current, tile, block.width, approximation + block.start, block.columns);
  store_columns(tile.changes, tile, block.width, changes, block.width);
}

template <typename Walk>
void for_each_tile(const Block& block, Walk walk) {
  const int64_t tiles = (block.rows + kLanes - 1) / kLanes;
#pragma omp parallel
  {
    Tile tile;
    tile.entries.assign(block.groups * block.clusters, Aligned{});
    tile.midpoints.assign(block.groups * block.clusters, Aligned{});
    std::fill_n(tile.values, kBlockColumns, Floats{});
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      tile.first = t * kLanes;
      tile.rows = std::min<int64_t>(kLanes, block.rows - tile.first);
      walk(tile);
    }
  }
}

}  // namespace
}  // namespace spallm

// Rounds columns [start, start + width) of `work` and leaves their errors / U_ii in `errors`
// [rows, width]; `work` itself is not written. Everything is contiguous, width at most 128.
SPALLM_EXPORT void spallm_round_columns(const float* tables, int64_t groups, int32_t clusters,
                                        const int64_t* group_of, uint8_t* codes, int64_t rows,
                                        int64_t columns, int64_t start, int64_t width,
                                        const float* factor, float* work, float* errors) {
  const spallm::Block block{rows, columns, start, width, groups, clusters, group_of, tables, codes};
  spallm::for_each_tile(block, [&](spallm::Tile& tile) {
    spallm::round_tile(block, tile, work, factor, errors);
  });
}

// One pass of coordinate descent over columns [start, start + width): codes and approximation are
// rewritten, what the approximation changed by goes to `changes` [rows, width].
SPALLM_EXPORT void spallm_descend_columns(const float* tables, int64_t groups, int32_t clusters,
                                          const int64_t* group_of, uint8_t* codes, int64_t rows,
                                          int64_t columns, int64_t start, int64_t width,
                                          const float* hessian, float* approximation,
                                          const float* gradient, float* changes) {
  const spallm::Block block{rows, columns, start, width, groups, clusters, group_of, tables, codes};
  spallm::for_each_tile(block, [&](spallm::Tile& tile) {
    spallm::descend_tile(block, tile, approximation, gradient, hessian, changes);
  });
}
