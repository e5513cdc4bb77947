// The layout that the CPU kernels read codes in, and what all instruction sets share.
//
// A row's columns are cut into groups with a table each, a group into steps of 32 columns. Lane l of
// step s is column 32 s + l of its group. Codes lie in chunks of 64 bytes:
//   3 and 4 bits  a chunk is 32 words of 16 bits, one a lane. The words that a lane has in
//                 successive chunks are one stream of bits, its codes in step order from the lowest.
//   2 bits        a chunk is 16 words of 32 bits. The nibble s of word d holds the codes of columns
//                 2 d (low half) and 2 d + 1 (high half) of step s: a pair of weights is one look-up.
// Groups start on chunks of their own. Columns that pad a group's last step repeat its last code.
// In front of the first row lies one that says what the codes are (Header).

#pragma once

#include <cstdint>

namespace spallm {

constexpr int64_t kStep = 32;
constexpr int64_t kChunk = 64;
#ifndef SPALLM_SMALL_TILES
constexpr int kMaxTokens = 8;  // of one slot that one pass over a row serves
constexpr int kMaxSlots = 4;   // of different slots: their tables take registers too
#else  // for a build with sanitizers, which has as much to compile for every number of tokens
constexpr int kMaxTokens = 3;
constexpr int kMaxSlots = 3;
#endif
// Rows that are done for one batch of tokens before the next: their codes stay in the first cache.
constexpr int kRowBlock = 8;

enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kWord = 3, kByte = 4 };

struct Layout {
  int64_t rows, columns, groups;
  int32_t bits;

  int64_t entries() const { return int64_t{1} << bits; }
  int64_t width() const { return columns / groups; }
  int64_t steps() const { return (width() + kStep - 1) / kStep; }
  int64_t steps_filled_up_to(int64_t whole) const { return (steps() + whole - 1) / whole * whole; }
  int64_t chunks() const {
    return bits == 2 ? (steps() + 7) / 8 : (bits * steps() + 15) / 16;
  }
  int64_t row_bytes() const { return groups * chunks() * kChunk; }
  // Width of a row whose groups are filled up to whole steps.
  int64_t padded(int64_t steps_together = 1) const {
    return groups * steps_filled_up_to(steps_together) * kStep;
  }
  bool is_padded() const { return width() % kStep != 0; }
};

// The start of the row in front of the first.
struct Header {
  int64_t rows, columns, groups, bits;

  bool fits(const Layout& layout) const {
    return rows == layout.rows && columns == layout.columns && groups == layout.groups &&
           bits == layout.bits;
  }
};

// Up to kMaxTokens tokens that one pass over a row's codes serves.
struct Batch {
  int32_t count;
  bool one_slot;                  // all of tables[] are the same
  int64_t token[kMaxTokens];      // rows of x and y
  const char* tables[kMaxTokens]; // of each token's slot: its first row
  int64_t slot[kMaxTokens];
};

// A token's products with integers are (the sum - surplus) * scale * the scale of the row's table.
struct TokenFactors {
  float scale, surplus;
};

// Products of integers.
struct IntegerKernels {
  // As Kernels::dot_float32, of integers alone.
  void (*dot)(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
              const char* const* tables, Type type, const int16_t* const* x, float* products);
  // Makes a token's activations what `dot` reads, two bytes for each column of groups that are filled
  // up to whole multiples of so many steps. May write as many floats to `room`.
  TokenFactors (*to_integers)(const Layout& layout, const char* x, Type type, float* room,
                              int16_t* out);
  int steps;
};

// What an instruction set offers. Rows of codes start on 64 bytes where the caller's buffer does.
struct Kernels {
  // In the order that dot_float32 reads activations in, of every 2 * lanes columns the even ones come
  // first.
  int lanes;

  // products[t * kRowBlock + r] of up to kRowBlock successive rows with a batch of tokens.
  //   tables: for each token the first row's tables in `type`; x: for each token its padded row.
  // That of bfloat16 rounds the tables to it, and is null where there is no bfloat16 arithmetic.
  void (*dot_bfloat16)(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                       const char* const* tables, Type type, const uint16_t* const* x,
                       float* products);
  void (*dot_float32)(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
                      const char* const* tables, Type type, const float* const* x,
                      float* products);

  // Of tables in 16-bit and in 8-bit integers; null where they would not be faster. The levels of
  // AVX-512 have them for processors with VNNI.
  const IntegerKernels *words, *bytes;

  // The weights of one row from its float32 tables. Group g starts at out + g * group_stride; where
  // that is the bare width, nothing is written beyond it.
  void (*decode_float32)(const Layout& layout, const uint8_t* codes, const float* tables, float* out,
                         int64_t group_stride);
  void (*decode_bfloat16)(const Layout& layout, const uint8_t* codes, const float* tables,
                          uint16_t* out, int64_t group_stride);

  // sums[g, k] = sum of values[j] over the columns j of group g with code k; overwrites.
  void (*bucket_sums)(const Layout& layout, const uint8_t* codes, const float* values, float* sums);

  // y[t * y_stride] = the product of one row of a weight in bfloat16 with each token x [tokens, columns].
  void (*dense_rows)(const uint16_t* row, int64_t columns, const float* x, int64_t tokens, float* y,
                     int64_t y_stride);
};

const Kernels& kernels(int32_t level);
// For so many products in all, of which a thread takes whole blocks.
int threads_for(int64_t products, int64_t blocks);

// Sums by code have no better way with AVX2.
void scalar_bucket_sums(const Layout& layout, const uint8_t* codes, const float* values,
                        float* sums);

#if defined(__x86_64__)
constexpr int kAvx2IntegerSteps = 2;
extern const IntegerKernels kAvx2Words, kAvx2Bytes, kAvx512Words, kAvx512Bytes;
#endif

extern const Kernels kScalar;
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bfloat16;

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((word >> 16) | 0x40);
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline float from_bfloat16(uint16_t half) {
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// The code of a column of a group, whatever its place in the layout.
inline uint32_t code_at(const Layout& layout, const uint8_t* group_codes, int64_t column) {
  const int64_t step = column / kStep, lane = column % kStep;
  if (layout.bits == 2) {
    uint32_t word;
    __builtin_memcpy(&word, group_codes + (step / 8) * kChunk + (lane / 2) * 4, sizeof word);
    return (word >> (4 * (step % 8) + 2 * (lane % 2))) & 3u;
  }
  const int64_t bit = layout.bits * step;
  uint16_t low, high = 0;
  const uint8_t* at = group_codes + (bit / 16) * kChunk + lane * 2;
  __builtin_memcpy(&low, at, sizeof low);
  if (bit % 16 + layout.bits > 16) __builtin_memcpy(&high, at + kChunk, sizeof high);
  const uint32_t both = low | (static_cast<uint32_t>(high) << 16);
  return (both >> (bit % 16)) & ((1u << layout.bits) - 1u);
}

}  // namespace spallm
