// `GlmOperator`: the curvature of a loss that reads its parameters through X W, as an operator for the solver loops.
#pragma once

#include <optional>
#include <string>

#include "../runtime/operator.h"
#include "../runtime/repeated.h"
#include "glm_operands.h"

namespace mlopt {

// v -> P^T (X^T f(X P v)) + diagonal * v, where P picks the weights and the biases out of a flat vector [N]. For one
// map, or with x of shape [T, n, D] for T maps side by side.
class GlmOperator final : public LinearOperator {
 public:
  // x: [T?, n, D], of the vectors' dtype or, with float32 vectors, of a half type. kind, curvature: f, see
  // mlopt/ops/glm.py. positions: int64 [C, D] or, with a bias, [C, D + 1]: where each weight, and the bias of its
  // class, lies in the vector; -1 for a bias that is not there. Each position appears once. size: N. diagonal: [T?, N].
  GlmOperator(const at::Tensor& x, const std::string& kind, const at::Tensor& curvature, const at::Tensor& positions,
              int64_t size, bool bias, std::optional<at::Tensor> diagonal);

  at::Tensor apply(const at::Tensor& vector) override;
  at::Tensor apply_rows(const at::Tensor& rows) override;
  bool worth_recording() const override { return x_.numel() <= kMostWorthRecording; }

 private:
  // Vectors [T, K, N] -> [T, K, N].
  at::Tensor multiply(const at::Tensor& vectors);
  void gather(const at::Tensor& vectors, at::Tensor& packed) const;
  void scatter(const at::Tensor& packed, at::Tensor& vectors) const;
  glm::Operands& operands(int64_t rhs);

  at::Tensor x_, curvature_, positions_, diagonal_;
  std::string kind_;
  int64_t size_;
  bool bias_;
  std::optional<glm::Operands> operands_;  // with the workspace of the last number of right-hand sides
};

}  // namespace mlopt
