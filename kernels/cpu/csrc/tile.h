// Products of a batch of tokens with rows of codes, for any instruction set that describes its
// arithmetic:
//
//   struct Math {
//     using X;                       // of activations, as they lie in memory
//     using Values;                  // those of one part of a unit
//     using Sum;                     // a register of float32, or of integers of 32 bits
//     using Codes;                   // of one chunk: a register, or where it lies
//     template <int Bits> using Index, Table, Weights;
//     kUnitSteps                     // are multiplied together,
//     kParts, kPartColumns           // in so many parts
//     kStepsTogether                 // where their columns are mixed, in all but whole blocks
//     kFewTokens, kFewRows           // up to so many tokens take so many rows at a time
//     kManyRows                      // more tokens than that
//     kCacheBytes, kSpanBytes        // of activations: more of all tokens than the first do not stay in
//                                    // the first cache, beside codes and sums; so many of a span do
//     kSlotsInSpans                  // tokens of several slots, too: not what is slow to look up for
//     zero(), codes(at), index<Bits, Step, Part, Whole>(chunks), table<Bits>(entries, type),
//     look_up<Bits>(index, table), values(x), multiply_add(sum, values, weights),
//     lane_sums(four sums, out)
//   };
//
// To be included after the file's target pragma, layout.h and numbers.h before it: what is no template
// of theirs has to run on every processor.

#pragma once

#include <utility>

#include "layout.h"
#include "numbers.h"

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace spallm {
namespace {

template <int Bits>
constexpr int kBlockSteps = Bits == 4 ? 4 : Bits == 3 ? 16 : 8;  // whole chunks' worth
template <int Bits>
constexpr int kBlockChunks = Bits == 3 ? 3 : 1;

// Of one part of a step: the even columns, then the odd ones, as codes lie in the halves of a word.
template <typename Register>
struct Pair {
  Register even, odd;
};

// Chunks that the first `live` steps of a block lie in.
template <int Bits>
INLINE int live_chunks(int live) {
  return Bits == 3 ? (3 * live + 15) / 16 : 1;
}

// Rows and tokens whose products are summed at a time. One load of a token's activations serves all
// of the rows; an output has one sum, in the order of the steps, whatever other tokens there are.
template <typename Math, int Bits, int Rows, int Tokens, bool OneSlot>
struct Tile {
  static constexpr int kTables = OneSlot ? 1 : Tokens;

  typename Math::template Table<Bits> tables[Rows][kTables];
  typename Math::Sum sums[Rows][Tokens];

  template <int Step, int Part, bool Whole>
  INLINE void multiply(const typename Math::Codes (*chunk)[kBlockChunks<Bits>],
                       const typename Math::X* const* x, int64_t column) {
    typename Math::template Index<Bits> at[Rows];
    typename Math::template Weights<Bits> weights[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      at[r] = Math::template index<Bits, Step, Part, Whole>(chunk[r]);
      weights[r] = Math::template look_up<Bits>(at[r], tables[r][0]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const typename Math::Values values =
          Math::values(x[t] + column + Step * kStep + Part * Math::kPartColumns);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        if (!OneSlot && t > 0) weights[r] = Math::template look_up<Bits>(at[r], tables[r][t]);
        sums[r][t] = Math::multiply_add(sums[r][t], values, weights[r]);
      }
    }
  }

  template <int Step, bool Whole, int... Parts>
  INLINE void multiply_unit(const typename Math::Codes (*chunk)[kBlockChunks<Bits>],
                            const typename Math::X* const* x, int64_t column,
                            std::integer_sequence<int, Parts...>) {
    (multiply<Step, Parts, Whole>(chunk, x, column), ...);
  }

  // Only the first `live` steps of the block are there, all of them in a whole one.
  template <bool Whole, int... Units>
  INLINE void multiply_block(const uint8_t* codes, int64_t row_bytes,
                             const typename Math::X* const* x, int64_t column, int live,
                             std::integer_sequence<int, Units...>) {
    constexpr auto kEachPart = std::make_integer_sequence<int, Math::kParts>{};
    typename Math::Codes chunk[Rows][kBlockChunks<Bits>];
    const int chunks = live_chunks<Bits>(live);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < kBlockChunks<Bits>; ++c)
        // A chunk that is not there is not used either, but is not read.
        chunk[r][c] = Math::codes(codes + r * row_bytes + (c < chunks ? c : 0) * kChunk);
    constexpr int kSteps = Math::kUnitSteps, kTogether = Math::kStepsTogether;
    ((Units * kSteps / kTogether * kTogether < live
          ? multiply_unit<Units * kSteps, Whole>(chunk, x, column, kEachPart)
          : void()),
     ...);
  }

  // products[t * kRowBlock + r].
  INLINE void put(float* products) const {
    constexpr int kSums = Rows * Tokens;
    const auto total = [&](int place) ALWAYS_INLINE {
      return place < kSums ? sums[place % Rows][place / Rows] : Math::zero();
    };
#pragma GCC unroll 4
    for (int start = 0; start < kSums; start += 4) {
      alignas(16) float four[4];
      Math::lane_sums(total(start), total(start + 1), total(start + 2), total(start + 3), four);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        if (start + k < kSums)
          products[(start + k) / Rows * kRowBlock + (start + k) % Rows] = four[k];
    }
  }
};

// products[t * kRowBlock + r] of `rows` rows, Rows at a time; a rest is left out. In spans, a part of
// the columns is multiplied for all rows before the next part: where the activations together do
// not stay in the first cache, every few rows would fetch them anew.
template <typename Math, int Bits, int Rows, int Tokens, bool OneSlot, bool InSpans>
void dot_tiles(const Layout& layout, const uint8_t* codes, int rows, const char* const* tables,
               Type type, const typename Math::X* const* x, float* products) {
  constexpr int kSteps = kBlockSteps<Bits>;
  constexpr int64_t kBlockBytes = kBlockChunks<Bits> * kChunk;
  constexpr int64_t kFit =
      Math::kSpanBytes / (Tokens * sizeof(typename Math::X) * kSteps * kStep), kSpan = kFit > 1 ? kFit : 1;
  constexpr auto kEach = std::make_integer_sequence<int, kSteps / Math::kUnitSteps>{};
  using Sums = Tile<Math, Bits, Rows, Tokens, OneSlot>;
  const int64_t padded_steps = layout.steps_filled_up_to(Math::kStepsTogether);
  const int64_t steps = layout.steps(), row_bytes = layout.row_bytes(), groups = layout.groups;
  const int64_t group_bytes = layout.chunks() * kChunk;
  const int64_t table_bytes = layout.entries() * size_of(type), row_tables = groups * table_bytes;
  const int64_t group_blocks = (steps + kSteps - 1) / kSteps, blocks = groups * group_blocks;
  // What the next rows need: the processor's own guess ends at every page. A few lines at a time: it
  // waits where too many are asked for at once.
  const auto fetch_ahead = [=](const uint8_t* chunk) ALWAYS_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < kBlockChunks<Bits>; ++c)
        __builtin_prefetch(chunk + (rows + r) * row_bytes + c * kChunk);
  };
  typename Math::Sum carried[kRowBlock / Rows][Rows][Tokens];
  for (int64_t first = 0, last = 0; last < blocks; first = last) {
    last = !InSpans || first + kSpan > blocks ? blocks : first + kSpan;
    for (int row = 0; row + Rows <= rows; row += Rows) {
      Sums tile;
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
          tile.sums[r][t] = InSpans && first > 0 ? carried[row / Rows][r][t] : Math::zero();
      if (!OneSlot && first == 0)  // of one slot they are read once for all tokens, of several as codes are
        for (int64_t at = (row + rows) * row_tables, end = at + Rows * row_tables; at < end; at += kChunk)
          if (at % kChunk < Rows * row_tables)
            for (int t = 0; t < Sums::kTables; ++t) __builtin_prefetch(tables[t] + at);
      for (int64_t g = InSpans ? first / group_blocks : 0; g * group_blocks < last; ++g) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int t = 0; t < Sums::kTables; ++t)
            tile.tables[r][t] = Math::template table<Bits>(
                tables[t] + ((row + r) * groups + g) * table_bytes, type);
        // Of this group's steps.
        int64_t step = InSpans && first > g * group_blocks ? (first - g * group_blocks) * kSteps : 0;
        const int64_t span_end = (last - g * group_blocks) * kSteps;
        const int64_t stop = InSpans && span_end < steps ? span_end : steps;
        const uint8_t* chunk =
            codes + row * row_bytes + g * group_bytes + step / kSteps * kBlockBytes;
        for (; step + kSteps <= stop; step += kSteps, chunk += kBlockBytes) {
          fetch_ahead(chunk);
          tile.template multiply_block<true>(chunk, row_bytes, x, (g * padded_steps + step) * kStep,
                                             kSteps, kEach);
        }
        if (step < stop) {
          fetch_ahead(chunk);
          tile.template multiply_block<false>(chunk, row_bytes, x,
                                              (g * padded_steps + step) * kStep,
                                              static_cast<int>(stop - step), kEach);
        }
      }
      if (!InSpans || last == blocks) {
        tile.put(products + row);
        continue;
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) carried[row / Rows][r][t] = tile.sums[r][t];
    }
  }
}

template <typename Math>
using DotTiles = void (*)(const Layout&, const uint8_t*, int, const char* const*, Type,
                          const typename Math::X* const*, float*);

// For Least tokens or more.
template <typename Math, int Bits, int Rows, bool OneSlot, bool InSpans, int Least, int... More>
DotTiles<Math> dot_for(int count, std::integer_sequence<int, More...>) {
  static constexpr DotTiles<Math> kFor[] = {
      dot_tiles<Math, Bits, Rows, Least + More, OneSlot, InSpans>...};
  return kFor[count - Least];
}

template <typename Math, int Bits, int Rows, int Least, int MostTokens, int MostSlots>
DotTiles<Math> dot_for(const Layout& layout, const Batch& batch) {
  constexpr int kLeastSlots = Least < 2 ? 2 : Least;  // one token is of one slot
  constexpr auto kTokens = std::make_integer_sequence<int, MostTokens - Least + 1>{};
  constexpr auto kSlots = std::make_integer_sequence<int, MostSlots - kLeastSlots + 1>{};
  const bool fit =
      batch.count * layout.padded() * int64_t{sizeof(typename Math::X)} <= Math::kCacheBytes;
  if constexpr (Math::kSlotsInSpans && Least > Math::kFewTokens) {
    if (!batch.one_slot && !fit)
      return dot_for<Math, Bits, Rows, false, true, kLeastSlots>(batch.count, kSlots);
  }
  if (!batch.one_slot) return dot_for<Math, Bits, Rows, false, false, kLeastSlots>(batch.count, kSlots);
  if constexpr (Least > Math::kFewTokens) {
    if (!fit) return dot_for<Math, Bits, Rows, true, true, Least>(batch.count, kTokens);
  }
  return dot_for<Math, Bits, Rows, true, false, Least>(batch.count, kTokens);
}

// One row at a time, a few tokens at a time, each with its own tables: for the rows that are left.
template <typename Math, int Bits>
void dot_rest(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
              const char* const* tables, Type type, const typename Math::X* const* x,
              float* products) {
  constexpr auto kCounts = std::make_integer_sequence<int, kMaxSlots>{};
  for (int start = 0; start < batch.count; start += kMaxSlots) {
    const int left = batch.count - start;
    dot_for<Math, Bits, 1, false, false, 1>(left < kMaxSlots ? left : kMaxSlots, kCounts)(
        layout, codes, rows, tables + start, type, x + start, products + start * kRowBlock);
  }
}

template <typename Math, int Bits>
void dot_rows(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
              const char* const* tables, Type type, const typename Math::X* const* x,
              float* products) {
  // A product waits for the one before in the same sum, so several sums have to be under way. They
  // are those of several rows and never parts of one: an output does not depend on what other
  // tokens are there.
  constexpr int kFew = Math::kFewTokens;
  const bool few = batch.count <= kFew;
  const int together = few ? Math::kFewRows : Math::kManyRows, whole = rows / together * together;
  if (whole > 0)
    (few ? dot_for<Math, Bits, Math::kFewRows, 1, kFew, kFew>(layout, batch)
         : dot_for<Math, Bits, Math::kManyRows, kFew + 1, kMaxTokens, kMaxSlots>(layout, batch))(
        layout, codes, whole, tables, type, x, products);
  if (whole == rows) return;
  const char* rest[kMaxTokens];
  const int64_t skipped = whole * layout.groups * layout.entries() * size_of(type);
  for (int t = 0; t < batch.count; ++t) rest[t] = tables[t] + skipped;
  dot_rest<Math, Bits>(layout, codes + whole * layout.row_bytes(), rows - whole, batch, rest, type,
                       x, products + whole);
}

// See Kernels::dot_bfloat16 and dot_float32.
template <typename Math>
void dot(const Layout& layout, const uint8_t* codes, int rows, const Batch& batch,
         const char* const* tables, Type type, const typename Math::X* const* x, float* products) {
  const auto dot = layout.bits == 2   ? dot_rows<Math, 2>
                   : layout.bits == 3 ? dot_rows<Math, 3>
                                      : dot_rows<Math, 4>;
  dot(layout, codes, rows, batch, tables, type, x, products);
}

}  // namespace
}  // namespace spallm
