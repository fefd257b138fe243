// `GlmOperator`: the curvature of a loss that reads its parameters through X W, as an operator for the solver loops.
#pragma once

#include <optional>
#include <string>

#include "../runtime/operator.h"
#include "../runtime/repeated.h"
#include "glm_operands.h"
#include "glm_packing.h"

namespace mlopt {

// v -> P^T (X^T f(X P v)) + diagonal * v, where P picks the weights and the biases out of a flat vector [N]. For one
// map, or with x of shape [T, n, D] for T maps side by side.
class GlmOperator final : public LinearOperator {
 public:
  // x: [T?, n, D], of the vectors' dtype or, with float32 vectors, of a half type. kind, curvature: f, see
  // mlopt/ops/glm.py. positions, size, bias: see GlmPacking. diagonal: [T?, N].
  GlmOperator(const at::Tensor& x, const std::string& kind, const at::Tensor& curvature, const at::Tensor& positions,
              int64_t size, bool bias, std::optional<at::Tensor> diagonal);

  at::Tensor apply(const at::Tensor& vector) override;
  at::Tensor apply_rows(const at::Tensor& rows) override;
  bool worth_recording() const override { return x_.numel() <= kMostWorthRecording; }

 private:
  // Vectors [T, K, N] -> [T, K, N].
  at::Tensor multiply(const at::Tensor& vectors);
  glm::Operands& operands(int64_t rhs);

  GlmPacking packing_;
  at::Tensor x_, curvature_, diagonal_;
  std::string kind_;
  std::optional<glm::Operands> operands_;  // with the workspace of the last number of right-hand sides
};

}  // namespace mlopt
