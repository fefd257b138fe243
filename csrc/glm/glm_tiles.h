// The two matrix products of the family `glm` on a block of rows, for one instruction set at a time (CPU).
//
// Both keep a tile of accumulators in registers and run their lanes over features. glm_tiles.cpp chooses the
// instruction set of the machine once.
#pragma once

#include <cstdint>

namespace mlopt {

template <typename T>
struct GlmTiles {
  // u[i * columns + c] = sum_d x[i * features + d] * v[c * stride + d] for `rows` rows and `columns` columns.
  void (*forward)(const T* x, int64_t rows, int64_t features, const T* v, int64_t columns, int64_t stride, T* u);
  // acc[c * stride + d] += sum_i x[i * features + d] * u[i * columns + c]
  void (*backward)(const T* x, int64_t rows, int64_t features, const T* u, int64_t columns, int64_t stride, T* acc);
  const char* name;
};

// The tiles for this machine.
template <typename T>
const GlmTiles<T>& glm_tiles();

// All that this machine can run, the best first; for tests. Returns how many were written to `tiles` (at most 3).
template <typename T>
int glm_all_tiles(GlmTiles<T>* tiles);

}  // namespace mlopt
