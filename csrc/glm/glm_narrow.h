// Descent on a loss with few features (CPU): the lanes run over rows.
//
// Where X has few columns, tiles whose lanes run over features (glm_tiles.h) spend their time on sums across lanes. A
// descent reads the same X in every step, so here X is first copied into blocks of kGlmNarrowRows rows, [D, rows] each,
// and so are the weights and targets of the rows. A step is then one pass over the blocks: U = X W, the row function
// and X^T f(U) for a block before the next, all by whole vectors. Sums run over rows in a fixed order: lanes within a
// chunk of rows, then the chunks.
#pragma once

#include "glm.h"

namespace mlopt {

constexpr int64_t kGlmNarrowRows = 64;       // of a block: eight vectors of float by AVX2
constexpr int64_t kGlmNarrowFeatures = 128;  // the most; then a block still is half of a second-level cache
constexpr int64_t kGlmMostLanes = 16;

inline int64_t glm_narrow_blocks(int64_t rows) { return (rows + kGlmNarrowRows - 1) / kGlmNarrowRows; }

// Blocks per chunk, each worth a thread.
inline int64_t glm_narrow_chunk(int64_t rows, int64_t features, int64_t classes) {
  const int64_t work = kGlmNarrowRows * (features + 4) * classes;  // the row function counts like a few features
  int64_t least = (int64_t(1) << 17) / work + 1;
  const int64_t blocks = glm_narrow_blocks(rows), most = 64;  // chunks
  if (least < (blocks + most - 1) / most) least = (blocks + most - 1) / most;
  return least;
}

// Elements per chunk: sums by lanes, then their sum, packed.
inline int64_t glm_narrow_partial(int64_t features, int64_t classes) {
  return classes * ((features + 1) * kGlmMostLanes + glm_stride(features, true));
}

// Elements of workspace of a descent.
inline int64_t glm_narrow_size(int64_t rows, int64_t features, int64_t classes) {
  const int64_t blocks = glm_narrow_blocks(rows), per_chunk = glm_narrow_chunk(rows, features, classes);
  return blocks * kGlmNarrowRows * (features + 2 * classes) +
         (blocks + per_chunk - 1) / per_chunk * glm_narrow_partial(features, classes);
}

// Whether a descent is one of few features; then it needs that workspace. It must make a few steps to be worth the
// copy.
inline bool glm_is_narrow(GlmFunction function, int64_t tasks, int64_t features, int64_t num_steps) {
  return function >= kGlmFitLinear && function <= kGlmFitSoftmax && tasks == 1 && features <= kGlmNarrowFeatures &&
         num_steps >= 4;
}

// Blocks of rows, as the loops of one instruction set take them.
template <typename T>
struct GlmNarrow {
  GlmFunction function;
  const T* x;        // [blocks, D, kGlmNarrowRows]; rows past the end are 0 (so infinite weights make NaN there)
  const T* scales;   // [blocks, C, kGlmNarrowRows]; likewise
  const T* targets;  // like scales
  int64_t features, classes, stride;
  bool bias;
};

// What glm_descent_cpu does with a workspace for this.
template <typename T>
void glm_narrow_descent_cpu(const GlmDescent<T>& q, ParallelFor pool);

}  // namespace mlopt
