// How long small products take, for the choice between the kernel and torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

namespace mlopt {

// Seconds that a package spends on a product by the kernel, and by torch. Torch adds `added`, if there is one: a row,
// or a matrix like the result. So does the kernel if `with_bias`; else the loops that follow it in the package do.
std::pair<double, double> small_mm_times(const at::Tensor& a, const at::Tensor& b,
                                         const std::optional<at::Tensor>& added, bool with_bias);

}  // namespace mlopt
