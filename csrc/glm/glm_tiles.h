// The two matrix products of the family `glm` on a block of rows, for one instruction set at a time (CPU).
//
// Both keep a tile of accumulators in registers and run their lanes over features. glm_tiles.cpp chooses the
// instruction set of the machine once.
//
// Tiles read X in strips, several rows at once, which the prefetcher of the hardware does not follow from page to page:
// by itself it leaves half of the time to waiting for memory. So a tile asks for the element `ahead` of every one that
// it reads: 0, or the distance to the block of rows that will be read next, if that fits into L2 beside this one.
// Addresses past the end of X are asked for, too, which is harmless.
#pragma once

#include <cstdint>

#include "glm_narrow.h"

namespace mlopt {

template <typename T>
struct GlmTiles {
  // u[i * columns + c] = sum_d x[i * features + d] * v[c * stride + d] for `rows` rows and `columns` columns.
  void (*forward)(const T* x, int64_t rows, int64_t features, const T* v, int64_t columns, int64_t stride, T* u,
                  int64_t ahead);
  // acc[c * stride + d] += sum_i x[i * features + d] * u[i * columns + c]
  void (*backward)(const T* x, int64_t rows, int64_t features, const T* u, int64_t columns, int64_t stride, T* acc,
                   int64_t ahead);
  // X^T f(X W) of blocks [first, last) of few features, to the packed `out`; acc: C * (D + 1) * kGlmMostLanes elements.
  void (*narrow)(const GlmNarrow<T>& q, int64_t first, int64_t last, const T* w, T* acc, T* out);
  const char* name;
};

// The tiles for this machine.
template <typename T>
const GlmTiles<T>& glm_tiles();

// All that this machine can run, the best first; for tests. Returns how many were written to `tiles` (at most 3).
template <typename T>
int glm_all_tiles(GlmTiles<T>* tiles);

}  // namespace mlopt
