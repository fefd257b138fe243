#include "glm_steps.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../runtime/signals.h"
#include "../runtime/workspace.h"
#include "glm_narrow.h"
#include "glm_operands.h"

namespace mlopt {
namespace {

constexpr const char* kName = "GlmSteps";
constexpr int64_t kUnpolled = int64_t(1) << 30;  // multiply-adds between two looks for Ctrl-C: a small part of a second

GlmFunction function_of(const std::string& kind) {
  if (kind == "linear") return kGlmFitLinear;
  if (kind == "logistic") return kGlmFitLogistic;
  TORCH_CHECK(kind == "softmax", kName, ": expected kind \"linear\", \"logistic\" or \"softmax\", got \"", kind, "\"");
  return kGlmFitSoftmax;
}

}  // namespace

GlmSteps::GlmSteps(const std::string& kind, const at::Tensor& positions, int64_t size, bool bias, int64_t num_states)
    : function_(function_of(kind)), packing_(kName, positions, size, bias), num_states_(num_states) {
  TORCH_CHECK(num_states == 1 || num_states == 2, kName, ": expected 1 or 2 states, got ", num_states);
  TORCH_CHECK(positions.numel() == size, kName, ": expected a position for each of ", size, " parameters, got ",
              positions.numel());
}

StepsResult GlmSteps::run(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& targets,
                          const at::Tensor& coefficients, const std::vector<at::Tensor>& present,
                          int64_t num_steps) const {
  const at::NoGradGuard no_grad;
  const WorkspaceScope scope;
  const int64_t classes = packing_.classes(), size = packing_.size();
  TORCH_CHECK(x.dim() == 2 && x.size(1) == packing_.features() && x.device() == packing_.device(), kName,
              ": expected x [n, ", packing_.features(), "] on ", packing_.device(), ", got ", x.sizes(), " on ",
              x.device());
  TORCH_CHECK(num_steps >= 0 && !present.empty() && present.size() % static_cast<size_t>(num_states_) == 0, kName,
              ": expected num_steps >= 0 and the tensors of ", num_states_, " states, got ", num_steps, ", ",
              present.size());
  glm::Sizes s;
  s.batched = s.several = false;
  s.bias = packing_.bias();
  s.rows = x.size(0);
  s.features = x.size(1);
  s.classes = classes;
  s.options = glm::options_for(x);
  glm::check(kName, "scales", scales, {s.rows, classes}, s.options);
  glm::check(kName, "targets", targets, {s.rows, classes}, s.options);
  glm::check(kName, "coefficients", coefficients, {num_states_, num_states_ + 2, size}, s.options);
  std::vector<at::Tensor> flat;
  int64_t elements = 0;
  for (const at::Tensor& tensor : present) {
    glm::check(kName, "a parameter or velocity", tensor, tensor.sizes(), s.options);
    elements += tensor.numel();
    flat.push_back(tensor.reshape({-1}));
  }
  TORCH_CHECK(elements == num_states_ * size, kName, ": expected ", num_states_ * size, " elements, got ", elements);
  at::Tensor vectors = at::cat(flat).view({num_states_, size});

  glm::Operands o(s, x);
  o.function = function_;
  o.values = targets.contiguous();
  o.scales = scales.contiguous();
  const int64_t stride = s.stride();
  const at::Tensor all = at::zeros({num_states_ * (num_states_ + 3), classes, stride}, s.options);
  at::Tensor states = all.narrow(0, 0, num_states_), packed = all.narrow(0, num_states_, all.size(0) - num_states_);
  packing_.gather(vectors, states);
  packing_.gather(coefficients.contiguous(), packed);
  o.v = states.select(0, 0);
  o.out = at::empty({classes, stride}, s.options);
  at::Tensor narrow;
  const int64_t work = 2 * s.rows * s.features * classes + 1;
  const int64_t at_once = std::min(num_steps, std::max<int64_t>(1, kUnpolled / work));
  if (x.is_cpu() && glm_is_narrow(function_, 1, s.features, at_once))  // each time copies X
    narrow = at::empty({glm_narrow_size(s.rows, s.features, classes)}, s.options);

  StepsResult result;
  SignalPoll poll;
  while (result.num_steps < num_steps && !result.error) {
    const int64_t count = std::min(at_once, num_steps - result.num_steps);
    with_dtype(kName, states, [&](auto zero) {
      using T = decltype(zero);
      T* first = states.mutable_data_ptr<T>();
      const GlmDescent<T> params{o.product<T>(),
                                 first,
                                 num_states_ == 2 ? first + classes * stride : nullptr,
                                 packed.const_data_ptr<T>(),
                                 nullptr,
                                 narrow.defined() ? narrow.mutable_data_ptr<T>() : nullptr,
                                 count};
      mlopt::run(kName, x, params, glm_descent_cpu<T>, MLOPT_CUDA(glm_descent_cuda<T>));
    });
    result.num_steps += count;
    try {
      poll();
    } catch (...) {
      result.error = std::current_exception();
    }
  }
  vectors.zero_();
  packing_.scatter(states, vectors);
  int64_t first = 0;
  for (const at::Tensor& tensor : present) {
    result.fed.push_back(vectors.view({-1}).narrow(0, first, tensor.numel()).view(tensor.sizes()));
    first += tensor.numel();
  }
  return result;
}

}  // namespace mlopt
