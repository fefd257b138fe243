// Every op of the extension: the table of contents of the native side.
//
// Tensors are [N] or [K, N]; per-row scalars are [] or [K]. A trailing underscore marks an op that writes its inputs,
// which the schema declares. Semantics are documented at the Python wrappers, mlopt/ops/.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <vector>

TORCH_LIBRARY(mlopt, m) {
  // vector
  m.def("dot(Tensor a, Tensor b) -> Tensor");
  m.def("norm(Tensor a) -> Tensor");
  m.def("cg_step_(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor ap, Tensor(d!) state) -> ()");
  m.def("neumann_step_(Tensor(a!) v, Tensor(b!) acc, Tensor av, float scale) -> ()");
  m.def("perturb(Tensor x, Tensor direction, Tensor step) -> Tensor");
}

namespace {

// What every op does above its kernel. They are internals of solvers and have no derivative: torch would only warn, in
// a backward pass, that a gradient is missing, so an input that asks for one is refused here. And torch leaves it to an
// op to count its writes, without which autograd would not notice that a tensor saved for backward has changed.
void refuse_gradients_and_count_writes(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                       torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> written;
  for (size_t k = 0; k < arguments.size(); ++k) {
    if (!values[k].isTensor()) continue;
    const at::Tensor& tensor = values[k].toTensor();
    TORCH_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad()), op.schema().name(),
                ": not differentiable, but ", arguments[k].name(),
                " requires a gradient; call it under torch.no_grad() or on detached tensors");
    const auto* alias = arguments[k].alias_info();
    if (alias != nullptr && alias->isWrite()) written.push_back(tensor);
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  for (const at::Tensor& tensor : written) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(mlopt, Autograd, m) {
  for (const char* op : {"dot", "norm", "cg_step_", "neumann_step_", "perturb"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients_and_count_writes>());
}
