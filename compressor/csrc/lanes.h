// Rows side by side: every step of an algorithm that knows no other row is one vector operation.

#pragma once

#include <cstdint>

namespace spallm {

constexpr int kLanes = 16;
constexpr int kMaxClusters = 16;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// For containers, which forget the alignment of a vector type but not that of a struct.
struct alignas(4 * kLanes) Aligned {
  Floats lanes;
};

// Compiled once a level; the loader picks the best that the processor has.
#if defined(__x86_64__) && !defined(SPALLM_ONE_LEVEL)
#define SPALLM_LEVELS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPALLM_LEVELS
#endif
#define SPALLM_EXPORT extern "C" __attribute__((visibility("default")))
#define SPALLM_INLINE inline __attribute__((always_inline))

}  // namespace spallm
