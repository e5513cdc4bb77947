// Bit-planes, as codes lie on disk, to and from the layout of the kernels.

#include <algorithm>
#include <cstring>
#include <vector>

#include "layout.h"

namespace spallm {
namespace {

// Both ways go through a row's codes as bytes: loops over bytes and lanes, which compilers turn into
// vector instructions.

void codes_from_planes(const uint8_t* planes, int64_t stride, int32_t bits, int64_t columns,
                       uint8_t* codes) {
  const int64_t bytes = (columns + 7) / 8;
  std::memset(codes, 0, 8 * bytes);
  for (int32_t plane = 0; plane < bits; ++plane)
    for (int64_t byte = 0; byte < bytes; ++byte)
      for (int i = 0; i < 8; ++i)
        codes[8 * byte + i] |=
            static_cast<uint8_t>(((planes[plane * stride + byte] >> i) & 1) << plane);
}

void planes_from_codes(const uint8_t* codes, int64_t columns, int32_t bits, uint8_t* planes,
                       int64_t stride) {
  for (int32_t plane = 0; plane < bits; ++plane)
    for (int64_t j = 0; j < columns; ++j)
      planes[plane * stride + j / 8] |=
          static_cast<uint8_t>(((codes[j] >> plane) & 1) << (j % 8));
}

template <typename Word, int Count>
struct Words {
  Word value[Count];

  static Words load(const uint8_t* at) {
    Words words;
    std::memcpy(&words, at, sizeof words);
    return words;
  }
  void store(uint8_t* at) const { std::memcpy(at, this, sizeof *this); }
};

// Adds the codes of a step's 32 columns to a group that is all zeros there.
void put_step(int32_t bits, uint8_t* group, int64_t step, const uint8_t* codes) {
  if (bits == 2) {
    uint8_t* at = group + (step / 8) * kChunk;
    auto words = Words<uint32_t, 16>::load(at);
    for (int d = 0; d < 16; ++d)
      words.value[d] |= static_cast<uint32_t>(codes[2 * d] | codes[2 * d + 1] << 2)
                        << (4 * (step % 8));
    words.store(at);
    return;
  }
  const int64_t bit = bits * step, shift = bit % 16;
  uint8_t* at = group + (bit / 16) * kChunk;
  auto words = Words<uint16_t, 32>::load(at);
  for (int lane = 0; lane < 32; ++lane)
    words.value[lane] |= static_cast<uint16_t>(codes[lane] << shift);
  words.store(at);
  if (shift + bits <= 16) return;
  auto next = Words<uint16_t, 32>::load(at + kChunk);
  for (int lane = 0; lane < 32; ++lane)
    next.value[lane] |= static_cast<uint16_t>(codes[lane] >> (16 - shift));
  next.store(at + kChunk);
}

void pack_row(const Layout& layout, const uint8_t* codes, uint8_t* row) {
  const int64_t width = layout.width();
  for (int64_t g = 0; g < layout.groups; ++g) {
    uint8_t* group = row + g * layout.chunks() * kChunk;
    for (int64_t step = 0; step < layout.steps(); ++step) {
      const uint8_t* from = codes + g * width + step * kStep;
      const int64_t left = width - step * kStep;
      uint8_t filled[kStep];
      if (left < kStep) {
        // A padding column repeats the last one, so that it never looks up an entry of its own.
        for (int64_t lane = 0; lane < kStep; ++lane) filled[lane] = from[std::min(lane, left - 1)];
        from = filled;
      }
      put_step(layout.bits, group, step, from);
    }
  }
}

void unpack_row(const Layout& layout, const uint8_t* row, uint8_t* codes) {
  const int64_t width = layout.width();
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t j = 0; j < width; ++j)
      codes[g * width + j] =
          static_cast<uint8_t>(code_at(layout, row + g * layout.chunks() * kChunk, j));
}

}  // namespace
}  // namespace spallm

using namespace spallm;

#pragma GCC visibility push(default)
extern "C" {

// planes [bits, rows, ceil(columns / 8)] to packed [1 + rows, row_bytes], which is all zeros.
void spallm_pack(const uint8_t* planes, int64_t rows, int64_t columns, int64_t groups,
                 int32_t bits, uint8_t* packed) {
  const Layout layout{rows, columns, groups, bits};
  const Header header{rows, columns, groups, bits};
  std::memcpy(packed, &header, sizeof header);
  const int64_t bytes = (columns + 7) / 8;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    thread_local std::vector<uint8_t> codes;
    codes.resize(8 * bytes);
    codes_from_planes(planes + row * bytes, rows * bytes, bits, columns, codes.data());
    pack_row(layout, codes.data(), packed + (1 + row) * layout.row_bytes());
  }
}

// The opposite, to planes that are all zeros.
void spallm_unpack(uint8_t* planes, int64_t rows, int64_t columns, int64_t groups, int32_t bits,
                   const uint8_t* packed) {
  const Layout layout{rows, columns, groups, bits};
  const int64_t bytes = (columns + 7) / 8;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    thread_local std::vector<uint8_t> codes;
    codes.resize(columns);
    unpack_row(layout, packed + (1 + row) * layout.row_bytes(), codes.data());
    planes_from_codes(codes.data(), columns, bits, planes + row * bytes, rows * bytes);
  }
}

}  // extern "C"
#pragma GCC visibility pop
