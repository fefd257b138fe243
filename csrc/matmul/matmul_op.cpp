// Tensors of the family `matmul`: checks, registration, and the function by which AOTInductor packages call it.
#include "matmul_op.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>

#include "../common/binding.h"
#include "../runtime/workspace.h"
#include "matmul.h"

namespace mlopt {
namespace {

void check_like(const char* name, const at::Tensor& x, const at::Tensor& a) {
  TORCH_CHECK(x.scalar_type() == a.scalar_type() && x.device() == a.device(), "mlopt::small_mm: expected ", name,
              " of ", a.scalar_type(), " on ", a.device(), ", got ", x.scalar_type(), " on ", x.device());
}

at::Tensor small_mm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
              "mlopt::small_mm: expected matrices [M, K] and [K, N], got ", a.sizes(), " and ", b.sizes());
  check_like("b", b, a);
  const int64_t rows = a.size(0), columns = b.size(1), depth = a.size(1);
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns, "mlopt::small_mm: expected bias of shape [", columns,
                "], got ", bias->sizes());
    check_like("bias", *bias, a);
  }
  // A graph with a free size may meet a larger one than it was made for.
  if (rows > kSmallMatmulDim || columns > kSmallMatmulDim || depth > kSmallMatmulDim ||
      rows * columns * depth > kSmallMatmulProducts)
    return bias ? at::addmm(*bias, a, b) : at::mm(a, b);
  at::Tensor c = at::detail::empty_cpu({rows, columns}, a.scalar_type());
  with_dtype("mlopt::small_mm", a, [&](auto zero) {
    using T = decltype(zero);
    small_matmul_cpu<T>({a.const_data_ptr<T>(), a.stride(0), a.stride(1), b.const_data_ptr<T>(), b.stride(0),
                         b.stride(1), bias ? bias->const_data_ptr<T>() : nullptr, bias ? bias->stride(0) : 0,
                         c.mutable_data_ptr<T>(), rows, columns, depth});
  });
  return c;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlopt, CPU, m) { m.impl("small_mm", TORCH_FN(small_mm)); }

}  // namespace mlopt

// What mlopt/backends/inductor/small.py declares to Inductor; without it a package would call the op through a list of
// boxed values, which takes longer than the product.
extern "C" __attribute__((visibility("default"))) AOTITorchError aoti_torch_cpu_small_mm(AtenTensorHandle a,
                                                                                         AtenTensorHandle b,
                                                                                         AtenTensorHandle* bias,
                                                                                         AtenTensorHandle* ret0) {
  using torch::aot_inductor::tensor_handle_to_tensor_pointer;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    std::optional<at::Tensor> row;
    if (bias != nullptr) row = *tensor_handle_to_tensor_pointer(*bias);
    *ret0 = torch::aot_inductor::new_tensor_handle(
        mlopt::small_mm(*tensor_handle_to_tensor_pointer(a), *tensor_handle_to_tensor_pointer(b), row));
  });
}

namespace mlopt {

std::pair<double, double> small_mm_times(const at::Tensor& a, const at::Tensor& b,
                                         const std::optional<at::Tensor>& added, bool with_bias) {
  using torch::aot_inductor::tensor_pointer_to_tensor_handle;
  constexpr int kRounds = 15;
  const at::NoGradGuard no_grad;
  const WorkspaceScope scope;
  at::Tensor left = a, right = b, row = added.value_or(at::Tensor());
  at::Tensor out = at::detail::empty_cpu({a.size(0), b.size(1)}, a.scalar_type());
  at::Tensor expanded = added ? added->expand(out.sizes()) : out;
  AtenTensorHandle x = tensor_pointer_to_tensor_handle(&left), w = tensor_pointer_to_tensor_handle(&right),
                   y = tensor_pointer_to_tensor_handle(&out), r = tensor_pointer_to_tensor_handle(&row),
                   e = tensor_pointer_to_tensor_handle(&expanded);
  const auto kernel = [&] {
    AtenTensorHandle made = nullptr;
    const auto error = aoti_torch_cpu_small_mm(x, w, with_bias ? &r : nullptr, &made);
    return error == 0 ? aoti_torch_delete_tensor_object(made) : error;
  };
  const auto by_torch = [&] {
    return added ? aoti_torch_cpu_addmm_out(y, e, x, w, 1, 1) : aoti_torch_cpu_mm_out(y, x, w);
  };
  TORCH_CHECK(kernel() == 0 && by_torch() == 0, "small_mm_times: a product failed");  // and both are warm now
  const int64_t products = std::max<int64_t>(a.numel() * b.size(1), 1);
  const int64_t calls = std::clamp<int64_t>(kSmallMatmulProducts / products, 1, 100);  // in a round, about 50 us
  const auto seconds = [&](const auto& product) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t k = 0; k < calls; ++k) product();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / static_cast<double>(calls);
  };
  // In turns, and the least: other work on the machine only adds, to both alike.
  std::pair<double, double> least{seconds(kernel), seconds(by_torch)};
  for (int k = 1; k < kRounds; ++k)
    least = {std::min(least.first, seconds(kernel)), std::min(least.second, seconds(by_torch))};
  return least;
}

}  // namespace mlopt
