// What the other files of the family know of its sweep on tensor cores.
#pragma once

#include "glm.h"

namespace mlopt {

constexpr int kGlmTensorColumns = 16;             // columns of U that a block has at a time
constexpr int64_t kGlmTensorFewestFeatures = 64;  // below, most of the warps would have none
constexpr int64_t kGlmTensorMostFeatures = 1408;  // above, V and the sum do not fit into the registers

inline bool glm_fits_tensor_cores(int64_t features, int64_t classes) {
  return classes <= kGlmTensorColumns && features >= kGlmTensorFewestFeatures && features <= kGlmTensorMostFeatures;
}

// Launches the sweep of a product, which leaves the sums of its chunks in q.partials, or returns false where it cannot.
bool glm_sweep_tensor(const GlmProduct<float>& q, mlopt_stream stream);

}  // namespace mlopt
