// The iterative solvers, without Python between their steps.
//
// Conjugate gradients start here, too, because a small solve takes less time than its first lines in Python would; what
// its end means is decided in mlopt/linalg/solvers/, for native and other operators alike. Vectors are [N], or K of
// them as rows of [K, N].
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "operator.h"

namespace mlopt {

struct CgResult {
  at::Tensor x;      // like b, contiguous
  at::Tensor state;  // [5] or [K, 5], see mlopt/ops/state.py
  at::Tensor scale;  // ||b||, [] or [K]
};

// Steps of conjugate gradients until no row runs any more, looked at every `check_every` steps, or `max_steps`. A row
// runs until ||r|| <= rtol ||b||. `start`: a first guess and its residual; where that is larger than b, zero is the
// better guess and is used. recorder: see repeated.h; used if `a` is worth it.
CgResult cg_solve(LinearOperator& a, const at::Tensor& b, const std::optional<std::pair<at::Tensor, at::Tensor>>& start,
                  double rtol, int64_t max_steps, int64_t check_every, pybind11::handle recorder);

// `num_terms - 1` steps of a Neumann series: term -= scale A term; total += term. recorder: as above.
void neumann_loop(LinearOperator& a, at::Tensor term, at::Tensor total, int64_t num_terms, double scale,
                  pybind11::handle recorder);

}  // namespace mlopt
