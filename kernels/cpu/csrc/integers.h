// What makes activations integers, whatever the instructions. To be included before any target
// pragma: it has to run on every processor.

#pragma once

#include <cstdint>
#include <limits>

namespace spallm {

// Of the entries of tables in 16 bits, and in 8.
constexpr float kLargestWord = 4096.0f, kLargestByte = 127.0f;
// Of activations in 16 bits.
constexpr float kLargestValue = 32767.0f;

// With entries of 8 bits activations go in pairs. A pair is two integers of 8 bits times a factor of
// its own, an integer of 16 bits in units of the token's scale: a small pair keeps as many digits as a
// large one, whatever outliers the token has. A pair's two products are summed in 16 bits, and two
// pairs', each times its factor, in 32.
//
// Entries are multiplied as numbers without a sign, so much larger: products have one factor like
// that. What it adds to a sum is the token's surplus.
constexpr int kByteShift = 128;
// The sizes of a pair together; with the half by which each may be rounded up, and the largest shifted
// entry, 255, their products fit 16 bits.
constexpr float kLargestPair = 127.0f;
// Factors fit 16 bits when they are rounded up.
constexpr float kLargestFactor = 32766.0f;
// What a sum takes of a unit of an activation: the largest shifted entry, and the part by which a
// factor that is rounded up makes it larger.
constexpr float kLargestShare = 255.0f * 128 / 127;

// The sum's, less what float32 may have rounded away when the sizes of so many values were added.
constexpr float kLargestSum = 0x1p31f * (1 - 0x1p-7f);

// The finest unit in which a token's activations can be integers such that no sum overflows.
struct IntegerScale {
  float value, inverse;

  // usable: all are numbers, and so is `most`. by_value: what the largest of them needs. most: the
  // largest sum of sizes that meet in one lane, of so many products with entries up to `entry`.
  IntegerScale(bool usable, float by_value, float most, float entry, int64_t products) {
    // Each product may be rounded up by half of the largest entry.
    const float rounding = static_cast<float>(products) / 2 * entry;
    const float by_sum = most * (entry / (kLargestSum - rounding));
    const float scale = by_value > by_sum ? by_value : by_sum;
    // The inverse of what is smaller is not finite; and nothing of it would be left anyway.
    inverse = usable && scale > 1e-36f ? 1.0f / scale : 0.0f;
    value = !usable             ? std::numeric_limits<float>::quiet_NaN()
            : inverse == 0.0f ? 0.0f
                              : scale;
  }
};

}  // namespace spallm
