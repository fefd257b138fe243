// Every op of the extension: the table of contents of the native side.
//
// A trailing underscore marks an op that writes its inputs, which the schema declares. Semantics and shapes are
// documented at the Python wrappers, mlopt/ops/.
#include <ATen/core/Tensor.h>
#include <ATen/core/enum_tag.h>
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

  // glm; a result that belongs to a bias is of size 0 where there is no bias
  m.def("glm_matmul(Tensor x, Tensor w, Tensor? bias) -> Tensor");
  m.def("glm_matmul_t(Tensor x, Tensor r, bool bias) -> (Tensor, Tensor)");
  m.def(
      "glm_hvp(Tensor x, Tensor v, Tensor? v_bias, str kind, Tensor curvature, Tensor? weights, Tensor? reg, "
      "Tensor? reg_bias) -> (Tensor, Tensor)");
  m.def(
      "glm_gradient(Tensor x, Tensor w, Tensor? bias, str loss, Tensor targets, Tensor? weights) "
      "-> (Tensor loss, Tensor dw, Tensor dbias, Tensor probabilities)");
  m.def(
      "glm_cg(Tensor x, Tensor b, Tensor? b_bias, Tensor? q0, Tensor? q0_bias, str kind, Tensor curvature, "
      "Tensor? weights, Tensor? reg, Tensor? reg_bias, float damping, float rtol, int max_steps) "
      "-> (Tensor q, Tensor q_bias, Tensor state)");
  m.def(
      "glm_neumann(Tensor x, Tensor b, Tensor? b_bias, str kind, Tensor curvature, Tensor? weights, Tensor? reg, "
      "Tensor? reg_bias, float damping, float scale, int num_terms) -> (Tensor q, Tensor q_bias, Tensor ratio)");
  m.def(
      "glm_gd(Tensor x, Tensor w, Tensor? bias, Tensor? velocity, Tensor? velocity_bias, str loss, Tensor targets, "
      "Tensor? weights, Tensor? reg, Tensor? reg_bias, float lr, float momentum, int num_steps) "
      "-> (Tensor w, Tensor bias, Tensor velocity, Tensor velocity_bias, Tensor losses)");

  // matmul; flexible_layout: Inductor may give operands of any strides
  m.def("small_mm(Tensor a, Tensor b, Tensor? bias=None) -> Tensor", {at::Tag::flexible_layout});
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
  for (const char* op : {"dot", "norm", "cg_step_", "neumann_step_", "perturb", "glm_matmul", "glm_matmul_t", "glm_hvp",
                         "glm_gradient", "glm_cg", "glm_neumann", "glm_gd", "small_mm"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients_and_count_writes>());
}
