// Calls every entry point on buffers of exactly the size they need, for a build with a sanitizer.
// Any bytes are codes, so random ones will do; all levels must agree with plain C++.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "layout.h"
#include "numbers.h"

extern "C" {
int32_t spallm_cpu_level();
int32_t spallm_cpu_integers(int32_t, int32_t);
int64_t spallm_lut_linear(const uint8_t*, int64_t, int64_t, int64_t, int32_t, const char*, int32_t,
                          const float*, int64_t, const char*, int32_t, int64_t, const int32_t*,
                          const char*, int32_t, char*, int32_t);
void spallm_dense_linear(const uint16_t*, int64_t, int64_t, const float*, int64_t, float*, int32_t);
void spallm_decode(const uint8_t*, int64_t, int64_t, int64_t, int32_t, const char*, int32_t, char*,
                   int32_t, int32_t);
void spallm_bucket_sums(const uint8_t*, int64_t, int64_t, int64_t, int32_t, const char*, int32_t,
                        float*, int32_t);
void spallm_tables_to_integers(const float*, int64_t, int64_t, int32_t, void*, float*);
void spallm_pack(const uint8_t*, int64_t, int64_t, int64_t, int32_t, uint8_t*);
void spallm_unpack(uint8_t*, int64_t, int64_t, int64_t, int32_t, const uint8_t*);
}

using namespace spallm;

namespace {

std::mt19937 generator(20261122);

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Exactly as large as asked, where a sanitizer watches both ends.
struct Buffer {
  explicit Buffer(int64_t bytes) : memory(static_cast<char*>(std::malloc(bytes)), std::free) {}
  char* data() const { return memory.get(); }
  std::unique_ptr<char, void (*)(void*)> memory;
};

Buffer numbers(int64_t count, Type type) {
  Buffer made(count * size_of(type));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) store(made.data(), i, type, normal(generator));
  return made;
}

void fail(const Layout& layout, const char* what, int32_t level, float found, float wanted) {
  std::printf("%s, level %d, %d bits, %lld x %lld, %lld groups: %g instead of %g\n", what, level,
              layout.bits, static_cast<long long>(layout.rows),
              static_cast<long long>(layout.columns), static_cast<long long>(layout.groups),
              static_cast<double>(found), static_cast<double>(wanted));
  std::exit(1);
}

void compare(const Layout& layout, const char* what, int32_t level, const char* found,
             const char* wanted, int64_t count, Type type, float absolute, float relative) {
  for (int64_t i = 0; i < count; ++i) {
    const float a = load(found, i, type), b = load(wanted, i, type);
    if (!(std::fabs(a - b) <= absolute + relative * std::fabs(b))) fail(layout, what, level, a, b);
  }
}

void compare(const Layout& layout, const char* what, int32_t level, const char* found,
             const char* wanted, int64_t count, Type type, float tolerance) {
  compare(layout, what, level, found, wanted, count, type, tolerance, tolerance);
}

void repack(const Layout& layout) {
  const int64_t width = (layout.columns + 7) / 8, bytes = layout.bits * layout.rows * width;
  const int64_t packed_bytes = (1 + layout.rows) * layout.row_bytes();
  Buffer planes(bytes), packed(packed_bytes), again(bytes);
  for (int64_t i = 0; i < bytes; ++i) {
    // The bits behind a row's last column are zero.
    const int64_t live = layout.columns - i % width * 8;
    planes.data()[i] = static_cast<char>(pick(0, 255) & (live >= 8 ? 255 : (1 << live) - 1));
  }
  std::memset(packed.data(), 0, packed_bytes);
  std::memset(again.data(), 0, bytes);
  auto* codes = reinterpret_cast<uint8_t*>(packed.data());
  spallm_pack(reinterpret_cast<const uint8_t*>(planes.data()), layout.rows, layout.columns,
              layout.groups, layout.bits, codes);
  spallm_unpack(reinterpret_cast<uint8_t*>(again.data()), layout.rows, layout.columns,
                layout.groups, layout.bits, codes);
  if (std::memcmp(planes.data(), again.data(), bytes) != 0) fail(layout, "repack", 0, 0, 0);
}

// Tables in integers, and the same in float32.
void exercise_integers(const Layout& layout, const uint8_t* codes, int64_t tokens, int64_t n_slots,
                       const int32_t* slots, Type type, int32_t level, Type integers) {
  const int64_t row_entries = layout.groups * layout.entries(), rows = n_slots * layout.rows;
  const int64_t most = integers == kByte ? 127 : 4096;
  Buffer entries(rows * row_entries * size_of(integers)), scales(rows * 4), floats(rows * row_entries * 4);
  for (int64_t row = 0; row < rows; ++row) {
    const float scale = static_cast<float>(pick(1, 9)) / static_cast<float>(most);
    reinterpret_cast<float*>(scales.data())[row] = scale;
    for (int64_t k = row * row_entries; k < (row + 1) * row_entries; ++k) {
      const int64_t entry = pick(-most, most);
      if (integers == kByte) entries.data()[k] = static_cast<char>(entry);
      else reinterpret_cast<int16_t*>(entries.data())[k] = static_cast<int16_t>(entry);
      store(floats.data(), k, kFloat32, static_cast<float>(entry) * scale);
    }
  }
  const Buffer x = numbers(tokens * layout.columns, type);
  const Buffer bias = numbers(layout.rows, kFloat32);
  const Buffer found(tokens * layout.rows * size_of(type)), wanted(tokens * layout.rows * size_of(type));
  const auto multiply = [&](const Buffer& tables, Type stored, const float* factors, const Buffer& y) {
    if (spallm_lut_linear(codes, layout.rows, layout.columns, layout.groups, layout.bits,
                          tables.data(), stored, factors, n_slots, x.data(), type, tokens, slots,
                          bias.data(), kFloat32, y.data(), level) != -1)
      fail(layout, "integers refused", level, 0, 0);
  };
  multiply(entries, integers, reinterpret_cast<const float*>(scales.data()), found);
  multiply(floats, kFloat32, nullptr, wanted);
  // Each product is of up to nine times a normal number, and off by a few 1,000ths of that or less; in
  // bfloat16 those of floats are off, too.
  const float sizes = std::sqrt(static_cast<float>(layout.columns));
  compare(layout, "integers", level, found.data(), wanted.data(), tokens * layout.rows, type,
          (integers == kByte ? 0.15f : 0.03f) * sizes, 0.01f);
}

// Tables in float32 to integers: each at most half a unit from where it was.
void exercise_to_integers(const Layout& layout, Type type) {
  const int64_t entries = layout.groups * layout.entries();
  const Buffer tables = numbers(layout.rows * entries, kFloat32);
  const Buffer whole(layout.rows * entries * size_of(type)), scales(layout.rows * 4);
  spallm_tables_to_integers(reinterpret_cast<const float*>(tables.data()), layout.rows, entries,
                            type, whole.data(), reinterpret_cast<float*>(scales.data()));
  for (int64_t k = 0; k < layout.rows * entries; ++k) {
    const float scale = reinterpret_cast<const float*>(scales.data())[k / entries];
    const int32_t integer = type == kByte ? reinterpret_cast<const int8_t*>(whole.data())[k]
                                          : reinterpret_cast<const int16_t*>(whole.data())[k];
    const float found = static_cast<float>(integer) * scale;
    const float wanted = load(tables.data(), k, kFloat32);
    if (!(std::fabs(found - wanted) <= 0.501f * scale))
      fail(layout, "to integers", 0, found, wanted);
  }
}

// A weight kept in bfloat16; level 0 is the oracle.
void exercise_dense(const Layout& layout, int64_t tokens) {
  const Buffer weight = numbers(layout.rows * layout.columns, kBfloat16);
  const Buffer x = numbers(tokens * layout.columns, kFloat32);
  std::vector<Buffer> y;
  for (int32_t level = 0; level <= spallm_cpu_level(); ++level) {
    y.emplace_back(tokens * layout.rows * 4);
    spallm_dense_linear(reinterpret_cast<const uint16_t*>(weight.data()), layout.rows,
                        layout.columns, reinterpret_cast<const float*>(x.data()), tokens,
                        reinterpret_cast<float*>(y.back().data()), level);
    compare(layout, "dense_linear", level, y.back().data(), y[0].data(), tokens * layout.rows,
            kFloat32, 1e-3f);
  }
}

void exercise(const Layout& layout) {
  const int64_t entries = layout.groups * layout.entries();
  Buffer packed((1 + layout.rows) * layout.row_bytes());
  for (int64_t i = 0; i < (1 + layout.rows) * layout.row_bytes(); ++i)
    packed.data()[i] = static_cast<char>(pick(0, 255));
  const Header header{layout.rows, layout.columns, layout.groups, layout.bits};
  std::memcpy(packed.data(), &header, sizeof header);
  const auto* codes = reinterpret_cast<const uint8_t*>(packed.data());
  const uint8_t* rows = codes + layout.row_bytes();

  const int64_t tokens = pick(1, 19), n_slots = layout.columns > 6000 ? tokens : pick(1, 6);
  std::vector<int32_t> slots(tokens);
  // Of the widest all are distinct: several tenants' tokens, one each, are multiplied in spans.
  const bool distinct = layout.columns > 6000;
  for (int64_t t = 0; t < tokens; ++t)
    slots[t] = static_cast<int32_t>(distinct ? t : pick(0, n_slots - 1));
  for (const Type type : {kFloat32, kBfloat16, kFloat16}) {
    const Type stored = static_cast<Type>(pick(0, 2));
    const Buffer x = numbers(tokens * layout.columns, type);
    const Buffer tables = numbers(n_slots * layout.rows * entries, stored);
    const Buffer bias = numbers(layout.rows, stored);
    const Buffer values = numbers(layout.rows * layout.columns, type);
    std::vector<Buffer> y, weights, sums;
    for (int32_t level = 0; level <= spallm_cpu_level(); ++level) {
      y.emplace_back(tokens * layout.rows * size_of(type));
      if (spallm_lut_linear(codes, layout.rows, layout.columns, layout.groups, layout.bits,
                            tables.data(), stored, nullptr, n_slots, x.data(), type, tokens,
                            slots.data(), bias.data(), stored, y.back().data(), level) != -1)
        fail(layout, "lut_linear refused", level, 0, 0);
      compare(layout, "lut_linear", level, y.back().data(), y[0].data(), tokens * layout.rows,
              type, type == kFloat32 ? 1e-3f : 0.3f);
      const Type decoded = type == kBfloat16 ? kBfloat16 : kFloat32;
      weights.emplace_back(layout.rows * layout.columns * size_of(decoded));
      spallm_decode(rows, layout.rows, layout.columns, layout.groups, layout.bits, tables.data(),
                    stored, weights.back().data(), decoded, level);
      compare(layout, "decode", level, weights.back().data(), weights[0].data(),
              layout.rows * layout.columns, decoded, 0);
      sums.emplace_back(layout.rows * entries * sizeof(float));
      std::memset(sums.back().data(), 0, layout.rows * entries * sizeof(float));
      spallm_bucket_sums(rows, layout.rows, layout.columns, layout.groups, layout.bits,
                         values.data(), type,
                         reinterpret_cast<float*>(sums.back().data()), level);
      compare(layout, "bucket_sums", level, sums.back().data(), sums[0].data(),
              layout.rows * entries, kFloat32, 1e-3f);
    }
  }
  for (int32_t level = 0; level <= spallm_cpu_level(); ++level)
    for (const Type type : {kFloat32, kBfloat16, kFloat16})
      for (const Type integers : {kWord, kByte})
        if (spallm_cpu_integers(level, integers))
          exercise_integers(layout, codes, tokens, n_slots, slots.data(), type, level, integers);
  exercise_dense(layout, tokens);
  for (const Type integers : {kWord, kByte}) exercise_to_integers(layout, integers);
  slots[tokens - 1] = static_cast<int32_t>(n_slots);
  if (spallm_lut_linear(codes, layout.rows, layout.columns, layout.groups, layout.bits, nullptr, 0,
                        nullptr, n_slots, nullptr, 0, tokens, slots.data(), nullptr, 0, nullptr, 0) !=
      tokens - 1)
    fail(layout, "a slot out of range", 0, 0, 0);
}

}  // namespace

int main() {
  for (int round = 0; round < 50; ++round) {
    const int64_t groups = pick(1, 4), width = pick(0, 3) == 0 ? 32 * pick(1, 40) : pick(1, 300);
    const Layout layout{pick(1, 21), groups * width, groups, static_cast<int32_t>(pick(2, 4))};
    repack(layout);
    exercise(layout);
  }
  // So wide that the activations of a few tokens do not stay in the first cache.
  for (int32_t bits = 2; bits <= 4; ++bits) exercise(Layout{3, 7200, 1, bits});
  std::puts("done");
}
