// Calls every entry point on buffers of exactly the size they need, for a build with a sanitizer.
// What they compute is tested elsewhere; here the last columns, rows and lanes matter.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

extern "C" {
void spallm_lloyd(const float*, const float*, int64_t, int64_t, int32_t, int32_t, int32_t, int64_t,
                  float*);
void spallm_round_columns(const float*, int64_t, int32_t, const int64_t*, uint8_t*, int64_t, int64_t,
                          int64_t, int64_t, const float*, float*, float*);
void spallm_descend_columns(const float*, int64_t, int32_t, const int64_t*, uint8_t*, int64_t,
                            int64_t, int64_t, int64_t, const float*, float*, const float*, float*);
void spallm_solve_tables(const uint8_t*, int64_t, int64_t, int64_t, int32_t, const float*,
                         const float*, float, float*);
int32_t spallm_multiplies_bfloat16();
void spallm_add_products(const uint16_t*, const uint16_t*, int64_t, int64_t, float*);
}

namespace {

std::mt19937 generator(20261122);

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Exactly as large as asked, where a sanitizer watches both ends.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t count) : size(count), memory(new T[count]()) {}
  T* data() { return memory.get(); }
  T& operator[](int64_t at) { return memory[at]; }
  int64_t size;
  std::unique_ptr<T[]> memory;
};

Buffer<float> numbers(int64_t count) {
  std::normal_distribution<float> normal;
  Buffer<float> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = normal(generator);
  return made;
}

// Well-conditioned, symmetric: its upper half serves as a factor, too.
Buffer<float> hessian(int64_t columns) {
  Buffer<float> made(columns * columns);
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < columns; ++j)
      made[i * columns + j] = (i == j ? 2.0f : 0.0f) + 1.0f / static_cast<float>(1 + i + j);
  return made;
}

bool all_finite(Buffer<float>& found) {
  for (int64_t i = 0; i < found.size; ++i)
    if (!std::isfinite(found[i])) return false;
  return true;
}

bool sketch(int64_t rows, int64_t groups, int64_t group_width, int32_t clusters) {
  const int64_t columns = groups * group_width;
  Buffer<float> weight = numbers(rows * columns), curve = hessian(columns);
  Buffer<float> importance(group_width), tables(rows * groups * clusters);
  for (int64_t i = 0; i < group_width; ++i) importance[i] = static_cast<float>(1 + i % 3);
  for (int64_t group = 0; group < groups; ++group) {
    Buffer<float> part(rows * group_width), learned(rows * clusters);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < group_width; ++i)
        part[r * group_width + i] = weight[r * columns + group * group_width + i];
    spallm_lloyd(part.data(), importance.data(), rows, group_width, clusters, 16, 50, 512,
                 learned.data());
    for (int64_t r = 0; r < rows; ++r)
      for (int32_t k = 0; k < clusters; ++k)
        tables[(r * groups + group) * clusters + k] = learned[r * clusters + k];
  }
  Buffer<int64_t> group_of(columns);
  for (int64_t i = 0; i < columns; ++i) group_of[i] = i / group_width;
  Buffer<uint8_t> codes(rows * columns);
  Buffer<float> approximation = numbers(rows * columns), gradient = numbers(rows * columns);
  for (int64_t start = 0; start < columns; start += 128) {
    const int64_t width = std::min<int64_t>(128, columns - start);
    Buffer<float> changes(rows * width);
    spallm_round_columns(tables.data(), groups, clusters, group_of.data(), codes.data(), rows,
                         columns, start, width, curve.data(), weight.data(), changes.data());
    if (!all_finite(changes)) return false;
    spallm_descend_columns(tables.data(), groups, clusters, group_of.data(), codes.data(), rows,
                           columns, start, width, curve.data(), approximation.data(),
                           gradient.data(), changes.data());
    if (!all_finite(changes)) return false;
  }
  for (int64_t i = 0; i < codes.size; ++i)
    if (codes[i] >= clusters) return false;
  Buffer<float> residual = numbers(tables.size), step(tables.size);
  spallm_solve_tables(codes.data(), rows, columns, groups, clusters, curve.data(), residual.data(),
                      1e-6f, step.data());
  return all_finite(tables) && all_finite(approximation) && all_finite(step);
}

bool products(int64_t tokens, int64_t columns) {
  Buffer<uint16_t> a(tokens * columns), b(tokens * columns);
  for (int64_t i = 0; i < a.size; ++i) {
    a[i] = static_cast<uint16_t>(0x3f80 + pick(0, 0x7f));  // 1 to 2
    b[i] = static_cast<uint16_t>(0xbf80 + pick(0, 0x7f));
  }
  Buffer<float> sum(columns * columns);
  spallm_add_products(a.data(), b.data(), tokens, columns, sum.data());
  spallm_add_products(a.data(), a.data(), tokens, columns, sum.data());
  return all_finite(sum);
}

}  // namespace

int main() {
  for (int round = 0; round < 40; ++round) {
    const int64_t rows = pick(1, 40), groups = pick(1, 4), width = pick(1, 90);
    const int32_t clusters = 1 << pick(2, 4);
    if (!sketch(rows, groups, width, clusters)) {
      std::printf("%lld rows, %lld groups of %lld, %d clusters\n", static_cast<long long>(rows),
                  static_cast<long long>(groups), static_cast<long long>(width), clusters);
      return 1;
    }
    const int64_t tokens = pick(1, 600), columns = pick(1, 100);
    if (spallm_multiplies_bfloat16() && !products(tokens, columns)) {
      std::printf("products of %lld tokens, %lld columns\n", static_cast<long long>(tokens),
                  static_cast<long long>(columns));
      return 1;
    }
  }
  // Numbers that are none must be survived, too.
  Buffer<float> odd(64), even(64), table(16);
  for (int64_t i = 0; i < 64; ++i) {
    odd[i] = i % 3 ? NAN : INFINITY;
    even[i] = i % 2 ? 0.0f : -1.0f;
  }
  spallm_lloyd(odd.data(), even.data(), 1, 64, 16, 16, 50, 512, table.data());
  std::puts("done");
}
