// Plain C++: what runs where there is neither AVX2 nor AVX-512, and what AVX2 has no better way for.

#include <vector>

#include "dense.h"
#include "layout.h"
#include "numbers.h"

namespace spallm {
namespace {

template <typename Out, Out (*Convert)(float)>
void decode(const Layout& layout, const uint8_t* codes, const float* tables, Out* out,
            int64_t group_stride) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const uint8_t* group = codes + g * layout.chunks() * kChunk;
    for (int64_t j = 0; j < group_stride; ++j)
      out[g * group_stride + j] =
          Convert(tables[g * layout.entries() + code_at(layout, group, j)]);
  }
}

float same(float value) { return value; }
uint16_t rounded(float value) { return to_bfloat16(value); }

float sum_of_products(const float* a, const float* b, int64_t count) {
  // Four chains, so that additions need not wait for each other.
  float sums[4] = {0, 0, 0, 0};
  int64_t j = 0;
  for (; j + 4 <= count; j += 4)
    for (int lane = 0; lane < 4; ++lane) sums[lane] += a[j + lane] * b[j + lane];
  for (; j < count; ++j) sums[0] += a[j] * b[j];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void dot_float32(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                 const char* const* tables, Type type, const float* const* x, float* products) {
  thread_local std::vector<float> entries, weights;
  const int64_t count = layout.groups * layout.entries();
  entries.resize(count);
  weights.resize(layout.padded());
  for (int r = 0; r < rows; ++r, codes += layout.row_bytes())
    for (int t = 0; t < batch.count; ++t) {
      if (t == 0 || !batch.one_slot) {
        for (int64_t k = 0; k < count; ++k) entries[k] = load(tables[t], r * count + k, type);
        decode<float, same>(layout, codes, entries.data(), weights.data(),
                            layout.steps() * kStep);
      }
      products[t * kRowBlock + r] = sum_of_products(weights.data(), x[t], layout.padded());
    }
}

}  // namespace

void scalar_bucket_sums(const Layout& layout, const uint8_t* codes, const float* values,
                        float* sums) {
  const int64_t entries = layout.entries(), width = layout.width();
  for (int64_t g = 0; g < layout.groups; ++g) {
    // Two sets of buckets: neighbours with the same code then do not wait for each other's store.
    float even[16] = {}, odd[16] = {};
    const uint8_t* group = codes + g * layout.chunks() * kChunk;
    const float* value = values + g * width;
    int64_t j = 0;
    for (; j + 2 <= width; j += 2) {
      even[code_at(layout, group, j)] += value[j];
      odd[code_at(layout, group, j + 1)] += value[j + 1];
    }
    if (j < width) even[code_at(layout, group, j)] += value[j];
    for (int64_t k = 0; k < entries; ++k) sums[g * entries + k] = even[k] + odd[k];
  }
}

const Kernels kScalar = {
    1, nullptr, dot_float32, nullptr, nullptr, decode<float, same>, decode<uint16_t, rounded>,
    scalar_bucket_sums, dense_rows<16>,
};

}  // namespace spallm
