// The loops of the iterative solvers, without Python between their steps.
//
// A loop is all that is here. How a solve starts and what its end means is decided once, for native and other operators
// alike, in mlopt/linalg/solvers/. Vectors are [N], or K of them as rows of [K, N]; written tensors are contiguous.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "operator.h"

namespace mlopt {

// Steps of conjugate gradients until no row runs any more, looked at every `check_every` steps, or `max_steps`.
void cg_loop(LinearOperator& a, at::Tensor x, at::Tensor r, at::Tensor p, at::Tensor state, int64_t max_steps,
             int64_t check_every);

// `num_terms - 1` steps of a Neumann series: term -= scale A term; total += term.
void neumann_loop(LinearOperator& a, at::Tensor term, at::Tensor total, int64_t num_terms, double scale);

}  // namespace mlopt
