// The C interface: what Python calls. Arguments are checked there; what would take a pass over data
// (the range of the slots) is checked here.

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "layout.h"
#include "numbers.h"

namespace spallm {

// Below so many products a second thread costs more than it saves.
constexpr int64_t kProductsPerThread = 1 << 19;

const Kernels& kernels(int32_t level) {
#if defined(__x86_64__)
  static const Kernels* const kLevels[] = {&kScalar, &kAvx2, &kAvx512, &kAvx512Bfloat16};
  return *kLevels[level];
#else
  (void)level;
  return kScalar;
#endif
}

// Of tables in integers; null of others, and where there are none.
const IntegerKernels* integer_kernels(int32_t level, Type type) {
  return type == kWord ? kernels(level).words : type == kByte ? kernels(level).bytes : nullptr;
}

int threads_for(int64_t products, int64_t blocks) {
  const int64_t wanted = std::min(products / kProductsPerThread + 1, blocks);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, omp_get_max_threads())));
}

namespace {

// Memory that grows and is kept, aligned for full cache lines.
class Scratch {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + 63) / 64 * 64;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// Tokens of one slot go together, up to kMaxTokens of them; those that are alone with theirs share
// batches of up to kMaxSlots, each with its own tables.
void make_batches(int64_t tokens, const int32_t* slots, const char* tables, int64_t slot_bytes,
                  std::vector<int64_t>& order, std::vector<Batch>& batches) {
  order.resize(tokens);
  for (int64_t t = 0; t < tokens; ++t) order[t] = t;
  if (slots != nullptr)
    std::stable_sort(order.begin(), order.end(),
                     [=](int64_t a, int64_t b) { return slots[a] < slots[b]; });
  const auto slot_of = [=](int64_t token) { return slots == nullptr ? 0 : slots[token]; };
  batches.clear();
  Batch alone{0, false, {}, {}, {}};
  for (int64_t start = 0; start < tokens;) {
    int64_t stop = start + 1;
    while (stop < tokens && stop - start < kMaxTokens &&
           slot_of(order[stop]) == slot_of(order[start]))
      ++stop;
    Batch together{0, true, {}, {}, {}};
    Batch& batch = stop - start == 1 ? alone : together;
    for (; start < stop; ++start) {
      batch.token[batch.count] = order[start];
      batch.slot[batch.count] = slot_of(order[start]);
      batch.tables[batch.count++] = tables + slot_of(order[start]) * slot_bytes;
    }
    if (together.count > 0) batches.push_back(together);
    if (alone.count == kMaxSlots || (stop == tokens && alone.count > 0)) {
      alone.one_slot = alone.count == 1;
      batches.push_back(alone);
      alone.count = 0;
      alone.one_slot = false;
    }
  }
}

// Activations as kernels read them: those of a token start so many bytes behind the one before.
struct Activations {
  const char* values;
  int64_t stride;
};

// The stride of a copy: an odd number of cache lines. A power of two would bring what all tokens have
// for the same columns into the same few places of the cache.
int64_t stride_for(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// x in bfloat16 as its kernels read it: groups filled up with zeros to whole steps.
Activations prepared_bfloat16(const Layout& layout, const char* x, int64_t tokens,
                              Scratch& scratch) {
  if (!layout.is_padded()) return {x, layout.columns * 2};
  const int64_t width = layout.width() * 2, padded_width = layout.steps() * kStep * 2;
  const int64_t stride = stride_for(layout.padded() * 2);
  char* out = scratch.at_least(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < layout.groups; ++g) {
      char* at = out + t * stride + g * padded_width;
      std::memcpy(at, x + (t * layout.groups + g) * width, width);
      std::memset(at + width, 0, padded_width - width);
    }
  return {out, stride};
}

// One group of a token's activations, see Kernels::lanes.
void arrange(const char* x, Type type, int64_t width, int64_t padded_width, int lanes, float* out) {
  int64_t j = 0;
  for (; j + 2 * lanes <= width; j += 2 * lanes) {
    float *even = out + j, *odd = out + j + lanes;
    if (type == kBfloat16) {  // loops of their own: the compiler makes vectors of them
      const char* from = x + 2 * j;
      for (int lane = 0; lane < lanes; ++lane) {
        uint32_t both;
        std::memcpy(&both, from + 4 * lane, sizeof both);
        even[lane] = bits_to_float(both << 16);
        odd[lane] = bits_to_float(both & 0xffff0000u);
      }
    } else if (type == kFloat32) {
      const float* from = reinterpret_cast<const float*>(x) + j;
      for (int lane = 0; lane < lanes; ++lane) {
        even[lane] = from[2 * lane];
        odd[lane] = from[2 * lane + 1];
      }
    } else {
      for (int lane = 0; lane < lanes; ++lane) {
        even[lane] = load(x, j + 2 * lane, type);
        odd[lane] = load(x, j + 2 * lane + 1, type);
      }
    }
  }
  const int64_t whole = j;
  std::fill(out + whole, out + padded_width, 0.0f);
  for (; j < width; ++j) out[whole + (j - whole) / 2 + (j - whole) % 2 * lanes] = load(x, j, type);
}

Activations prepared_float32(const Layout& layout, const char* x, Type type, int64_t tokens,
                             int lanes, Scratch& scratch) {
  if (lanes == 1 && type == kFloat32 && !layout.is_padded())
    return {x, layout.columns * int64_t{sizeof(float)}};
  const int64_t width = layout.width(), padded_width = layout.steps() * kStep;
  const int64_t stride = stride_for(layout.padded() * sizeof(float));
  char* out = scratch.at_least(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < layout.groups; ++g)
      arrange(x + (t * layout.groups + g) * width * size_of(type), type, width, padded_width, lanes,
              reinterpret_cast<float*>(out + t * stride) + g * padded_width);
  return {out, stride};
}

void load_floats(const char* from, Type type, int64_t count, float* out) {
  if (type == kBfloat16)  // a loop of its own: the compiler makes vectors of it
    for (int64_t k = 0; k < count; ++k)
      out[k] = from_bfloat16(reinterpret_cast<const uint16_t*>(from)[k]);
  else
    for (int64_t k = 0; k < count; ++k) out[k] = load(from, k, type);
}

// x in integers, with the factors of each token.
Activations prepared_integers(const IntegerKernels& with, const Layout& layout, const char* x,
                              Type type, int64_t tokens, TokenFactors* factors, Scratch& scratch) {
  const int64_t padded = layout.padded(with.steps);
  const int64_t stride = stride_for(padded * sizeof(int16_t));
  char* out = scratch.at_least(tokens * stride + padded * sizeof(float));
  float* room = reinterpret_cast<float*>(out + tokens * stride);
  for (int64_t t = 0; t < tokens; ++t)
    factors[t] = with.to_integers(layout, x + t * layout.columns * size_of(type), type, room,
                                  reinterpret_cast<int16_t*>(out + t * stride));
  return {out, stride};
}

// Calls use(r) for a block's rows, none of which reads what another writes.
template <typename Use>
inline void each_row(int count, Use&& use) {
  if (count == kRowBlock)  // of a known number the compiler makes vectors
#pragma GCC ivdep
    for (int r = 0; r < kRowBlock; ++r) use(r);
  else
#pragma GCC ivdep
    for (int r = 0; r < count; ++r) use(r);
}

// What sums of integers still lack.
struct Factors {
  const float* of_tables;  // [slots, rows]
  const TokenFactors* of_tokens;
  int64_t rows;

  void apply(const Batch& batch, int64_t row, int count, float* products) const {
    for (int t = 0; t < batch.count; ++t, products += kRowBlock) {
      const float* own = of_tables + batch.slot[t] * rows + row;
      // Those of many slots are too many streams for the processor's own guess.
      __builtin_prefetch(own + kRowBlock);
      const TokenFactors token = of_tokens[batch.token[t]];
      each_row(count, [&](int r) {
        products[r] = (products[r] - token.surplus) * (own[r] * token.scale);
      });
    }
  }
};

struct Output {
  char* y;
  Type type;
  const char* bias;
  Type bias_type;
  int64_t rows;

  // products[t * kRowBlock + r] of `count` rows.
  void put(const Batch& batch, int64_t row, int count, const float* products) const {
    float added[kRowBlock] = {};
    for (int r = 0; bias != nullptr && r < count; ++r) added[r] = load(bias, row + r, bias_type);
    for (int t = 0; t < batch.count; ++t, products += kRowBlock) {
      const int64_t first = batch.token[t] * rows + row;
      // Loops of their own: the compiler makes vectors of them.
      if (type == kBfloat16) {
        uint16_t* at = reinterpret_cast<uint16_t*>(y) + first;
        each_row(count, [&](int r) { at[r] = to_bfloat16(products[r] + added[r]); });
      } else if (type == kFloat32) {
        float* at = reinterpret_cast<float*>(y) + first;
        each_row(count, [&](int r) { at[r] = products[r] + added[r]; });
      } else {
        for (int r = 0; r < count; ++r) store(y, first + r, type, products[r] + added[r]);
      }
    }
  }
};

// Some rows with one batch, by either of Kernels' dot products.
template <typename X>
void rows_of_batch(void (*dot)(const Layout&, const uint8_t*, int, const Batch&,
                               const char* const*, Type, const X* const*, float*),
                   const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                   int64_t table_offset, Type table_type, const Activations& x, float* products) {
  const char* tables[kMaxTokens];
  const X* tokens[kMaxTokens];
  for (int t = 0; t < batch.count; ++t) {
    tables[t] = batch.tables[t] + table_offset;
    tokens[t] = reinterpret_cast<const X*>(x.values + batch.token[t] * x.stride);
  }
  dot(layout, codes, rows, batch, tables, table_type, tokens, products);
}

}  // namespace
}  // namespace spallm

using namespace spallm;

#pragma GCC visibility push(default)
extern "C" {

// The best level this processor has: 0 scalar, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16.
int32_t spallm_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 converts float16, too.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

// Whether this processor has products of kWord or kByte at a level, and faster ones than of floats.
int32_t spallm_cpu_integers(int32_t level, int32_t type) {
  if (level > spallm_cpu_level() || integer_kernels(level, static_cast<Type>(type)) == nullptr)
    return 0;
#if defined(__x86_64__)
  return level < 2 || __builtin_cpu_supports("avx512vnni");
#else
  return 1;
#endif
}

// y[t, r] = bias[r] + sum_j tables[slots[t], r, group(j), code[r, j]] x[t, j].
//   packed: the codes with their header.
//   scales: [slots, rows] of tables in integers; else null.
// Returns -1 when done. Otherwise y is untouched: -2 where the header says something else than the
// arguments, -3 where there are no instructions for integers, or the first token whose slot is not in
// 0 .. n_slots - 1.
int64_t spallm_lut_linear(const uint8_t* packed, int64_t rows, int64_t columns, int64_t groups,
                          int32_t bits, const char* tables, int32_t table_type,
                          const float* scales, int64_t n_slots, const char* x, int32_t x_type,
                          int64_t tokens, const int32_t* slots,
                          const char* bias, int32_t bias_type, char* y, int32_t level) {
  const Layout layout{rows, columns, groups, bits};
  const Kernels& with = kernels(level);
  const Type type = static_cast<Type>(x_type), stored = static_cast<Type>(table_type);
  if (!reinterpret_cast<const Header*>(packed)->fits(layout)) return -2;
  const IntegerKernels* integers = integer_kernels(level, stored);
  if ((stored == kWord || stored == kByte) && !spallm_cpu_integers(level, stored)) return -3;
  const uint8_t* codes = packed + layout.row_bytes();
  for (int64_t t = 0; slots != nullptr && t < tokens; ++t)
    if (slots[t] < 0 || slots[t] >= n_slots) return t;

  thread_local std::vector<int64_t> order;
  thread_local std::vector<Batch> batches;
  thread_local Scratch activations, factors;
  const int64_t row_table = groups * layout.entries() * size_of(stored);
  make_batches(tokens, slots, tables, rows * row_table, order, batches);
  const bool in_bfloat16 = type == kBfloat16 && with.dot_bfloat16 != nullptr;
  auto* token_factors =
      reinterpret_cast<TokenFactors*>(factors.at_least(tokens * sizeof(TokenFactors)));
  const Activations values =
      integers != nullptr
          ? prepared_integers(*integers, layout, x, type, tokens, token_factors, activations)
      : in_bfloat16 ? prepared_bfloat16(layout, x, tokens, activations)
                    : prepared_float32(layout, x, type, tokens, with.lanes, activations);
  const Factors missing{scales, token_factors, rows};
  const Output output{y, type, bias, static_cast<Type>(bias_type), rows};
  const Batch* batch = batches.data();
  const int64_t n_batches = static_cast<int64_t>(batches.size());
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;

#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns * tokens, blocks))
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * kRowBlock;
    const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows - row));
    const uint8_t* at = codes + row * layout.row_bytes();
    for (int64_t b = 0; b < n_batches; ++b) {
      float products[kMaxTokens * kRowBlock];
      const int64_t offset = row * row_table;
      if (integers != nullptr)
        rows_of_batch(integers->dot, layout, at, count, batch[b], offset, stored, values,
                      products);
      else if (in_bfloat16)
        rows_of_batch(with.dot_bfloat16, layout, at, count, batch[b], offset, stored, values,
                      products);
      else
        rows_of_batch(with.dot_float32, layout, at, count, batch[b], offset, stored, values,
                      products);
      if (integers != nullptr) missing.apply(batch[b], row, count, products);
      output.put(batch[b], row, count, products);
    }
  }
  return -1;
}

// Weights [rows, columns] in float32 or bfloat16 for codes and the tables of one slot.
void spallm_decode(const uint8_t* codes, int64_t rows, int64_t columns, int64_t groups,
                   int32_t bits, const char* tables, int32_t table_type, char* out,
                   int32_t out_type, int32_t level) {
  const Layout layout{rows, columns, groups, bits};
  const Kernels& with = kernels(level);
  const Type stored = static_cast<Type>(table_type);
  const int64_t entries = groups * layout.entries();

#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns, rows))
  for (int64_t row = 0; row < rows; ++row) {
    thread_local Scratch scratch;
    float* values = reinterpret_cast<float*>(scratch.at_least(entries * sizeof(float)));
    load_floats(tables + row * entries * size_of(stored), stored, entries, values);
    const uint8_t* at = codes + row * layout.row_bytes();
    if (out_type == kFloat32)
      with.decode_float32(layout, at, values, reinterpret_cast<float*>(out) + row * columns,
                          layout.width());
    else
      with.decode_bfloat16(layout, at, values, reinterpret_cast<uint16_t*>(out) + row * columns,
                           layout.width());
  }
}

// sums[r, g, k] += the sum of values[r, j] over the columns j of group g with code k.
void spallm_bucket_sums(const uint8_t* codes, int64_t rows, int64_t columns, int64_t groups,
                        int32_t bits, const char* values, int32_t values_type, float* sums,
                        int32_t level) {
  const Layout layout{rows, columns, groups, bits};
  const Kernels& with = kernels(level);
  const Type type = static_cast<Type>(values_type);
  const int64_t entries = groups * layout.entries();

#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns, rows))
  for (int64_t row = 0; row < rows; ++row) {
    thread_local Scratch scratch;
    float* found =
        reinterpret_cast<float*>(scratch.at_least((entries + columns) * sizeof(float)));
    const char* given = values + row * columns * size_of(type);
    if (type != kFloat32) {
      load_floats(given, type, columns, found + entries);
      given = reinterpret_cast<const char*>(found + entries);
    }
    with.bucket_sums(layout, codes + row * layout.row_bytes(),
                     reinterpret_cast<const float*>(given), found);
    for (int64_t k = 0; k < entries; ++k) sums[row * entries + k] += found[k];
  }
}

}  // extern "C"
#pragma GCC visibility pop
