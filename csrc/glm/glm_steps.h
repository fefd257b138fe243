// `GlmSteps`: many steps of descent on a loss that reads its parameters through X W, in one call.
#pragma once

#include <string>
#include <vector>

#include "../runtime/steps.h"
#include "glm.h"
#include "glm_packing.h"

namespace mlopt {

// The steps are those of `GlmDescent`, from the parameters and, if there is one, a velocity per parameter.
class GlmSteps {
 public:
  // kind: "linear", "logistic" or "softmax", see GlmFunction. positions, size, bias: see GlmPacking, for the vector of
  // all parameters one after the other. num_states: 1 for the parameters alone, 2 with velocities.
  GlmSteps(const std::string& kind, const at::Tensor& positions, int64_t size, bool bias, int64_t num_states);

  // x: [n, D]. scales, targets: q and t of GlmFunction, [n, C]. coefficients: of GlmDescent for unpacked vectors,
  // [num_states, num_states + 2, N]. present: the parameters, then their velocities; not written. Call it without the
  // GIL.
  // The result has the new values of `present` as `fed`. What is wrong with the arguments is thrown; Ctrl-C ends the
  // steps, and is in the result.
  StepsResult run(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& targets,
                  const at::Tensor& coefficients, const std::vector<at::Tensor>& present, int64_t num_steps) const;

 private:
  GlmFunction function_;
  GlmPacking packing_;
  int64_t num_states_;
};

}  // namespace mlopt
