#include "glm_operator.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>

namespace mlopt {
namespace {

constexpr const char* kName = "GlmOperator";

// The sizes of a call with `rhs` right-hand sides per task.
glm::Sizes sizes_for(const at::Tensor& x, int64_t classes, int64_t rhs, bool bias) {
  glm::Sizes s;
  s.batched = x.dim() == 3;
  s.several = true;
  s.bias = bias;
  s.options = glm::options_for(x);
  s.tasks = s.batched ? x.size(0) : 1;
  s.rhs = rhs;
  s.rows = x.size(-2);
  s.features = x.size(-1);
  s.classes = classes;
  return s;
}

}  // namespace

GlmOperator::GlmOperator(const at::Tensor& x, const std::string& kind, const at::Tensor& curvature,
                         const at::Tensor& positions, int64_t size, bool bias, std::optional<at::Tensor> diagonal)
    : packing_(kName, positions, size, bias),
      x_(glm::readable(x)),
      curvature_(curvature.contiguous()),
      diagonal_(diagonal ? diagonal->contiguous() : at::Tensor()),
      kind_(kind) {
  TORCH_CHECK((x.dim() == 2 || x.dim() == 3) && x.size(-1) == packing_.features() && x.device() == packing_.device(),
              kName, ": expected x [n, ", packing_.features(), "] or [T, n, ", packing_.features(), "] on ",
              packing_.device(), ", got ", x.sizes(), " on ", x.device());
  if (diagonal_.defined()) {
    at::DimVector shape;
    if (x.dim() == 3) shape.push_back(x.size(0));
    shape.push_back(size);
    glm::check(kName, "diagonal", diagonal_, shape, glm::options_for(x_));
  }
  operands(1);  // checks kind and curvature
}

glm::Operands& GlmOperator::operands(int64_t rhs) {
  if (operands_ && operands_->s.rhs == rhs) return *operands_;
  glm::Operands& o = operands_.emplace(sizes_for(x_, packing_.classes(), rhs, packing_.bias()), x_);
  o.set_curvature(kName, kind_, curvature_, std::nullopt);
  o.v = at::zeros({o.s.tasks, rhs, o.s.classes, o.s.stride()}, o.s.options);
  o.out = at::empty_like(o.v);
  return o;
}

at::Tensor GlmOperator::apply(const at::Tensor& vector) {
  TORCH_CHECK(x_.dim() == 2, kName, ": expected vectors of ", x_.size(0), " maps, got one vector");
  glm::check(kName, "vector", vector, {packing_.size()}, glm::options_for(x_));
  return multiply(vector.view({1, 1, packing_.size()})).view({packing_.size()});
}

at::Tensor GlmOperator::apply_rows(const at::Tensor& rows) {
  const bool tasks = x_.dim() == 3;
  glm::check(kName, "rows", rows, {tasks ? x_.size(0) : rows.size(0), packing_.size()}, glm::options_for(x_));
  const int64_t count = rows.size(0);
  if (count == 0) return at::empty_like(rows);
  return multiply(rows.reshape({tasks ? count : 1, tasks ? 1 : count, packing_.size()})).view({count, packing_.size()});
}

at::Tensor GlmOperator::multiply(const at::Tensor& given) {
  const at::Tensor vectors = given.contiguous();
  glm::Operands& o = operands(vectors.size(1));
  packing_.gather(vectors, o.v);
  o.multiply(kName);
  at::Tensor result =
      diagonal_.defined() ? at::mul(vectors, diagonal_.view({o.s.tasks, 1, packing_.size()})) : at::zeros_like(vectors);
  packing_.scatter(o.out, result);
  return result;
}

}  // namespace mlopt
