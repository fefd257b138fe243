// The steps of the family `vector` on tensors, for loops in C++: as the ops of the same names, with the workspace
// allocated by the caller once per solve.
#pragma once

#include <ATen/core/Tensor.h>

namespace mlopt {

at::Tensor dot(const at::Tensor& a, const at::Tensor& b);
at::Tensor norm(const at::Tensor& a);
at::Tensor cg_workspace(const at::Tensor& x);
void cg_step(at::Tensor& x, at::Tensor& r, at::Tensor& p, const at::Tensor& ap, at::Tensor& state,
             at::Tensor& workspace);
void neumann_step(at::Tensor& v, at::Tensor& acc, const at::Tensor& av, double scale);

}  // namespace mlopt
