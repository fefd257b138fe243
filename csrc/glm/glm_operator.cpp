#include "glm_operator.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
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
    : x_(glm::readable(x)),
      curvature_(curvature.contiguous()),
      positions_(positions.contiguous()),
      diagonal_(diagonal ? diagonal->contiguous() : at::Tensor()),
      kind_(kind),
      size_(size),
      bias_(bias) {
  TORCH_CHECK(x.dim() == 2 || x.dim() == 3, kName, ": expected x [n, D] or [T, n, D], got ", x.sizes());
  TORCH_CHECK(positions.dim() == 2 && positions.scalar_type() == at::kLong && positions.device() == x.device() &&
                  positions.size(0) >= 1 && positions.size(0) <= kGlmMaxClasses &&
                  positions.size(1) == x.size(-1) + (bias ? 1 : 0),
              kName, ": expected int64 positions [C, ", x.size(-1) + (bias ? 1 : 0), "] with C of 1 to ",
              kGlmMaxClasses, ", on ", x.device(), ", got ", positions.sizes(), ", ", positions.scalar_type(), ", on ",
              positions.device());
  const at::Tensor host = positions_.cpu();
  std::vector<bool> taken(static_cast<size_t>(size), false);
  for (int64_t k = 0; k < host.numel(); ++k) {
    const int64_t position = host.const_data_ptr<int64_t>()[k];
    const bool is_bias = bias && k % host.size(1) == host.size(1) - 1;
    if (position == -1 && is_bias) continue;
    TORCH_CHECK(position >= 0 && position < size && !taken[static_cast<size_t>(position)], kName,
                ": expected each position in 0..", size - 1, " at most once, got ", position);
    taken[static_cast<size_t>(position)] = true;
  }
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
  glm::Operands& o = operands_.emplace(sizes_for(x_, positions_.size(0), rhs, bias_), x_);
  o.set_curvature(kName, kind_, curvature_, std::nullopt);
  o.v = at::zeros({o.s.tasks, rhs, o.s.classes, o.s.stride()}, o.s.options);
  o.out = at::empty_like(o.v);
  return o;
}

at::Tensor GlmOperator::apply(const at::Tensor& vector) {
  TORCH_CHECK(x_.dim() == 2, kName, ": expected vectors of ", x_.size(0), " maps, got one vector");
  glm::check(kName, "vector", vector, {size_}, glm::options_for(x_));
  return multiply(vector.view({1, 1, size_})).view({size_});
}

at::Tensor GlmOperator::apply_rows(const at::Tensor& rows) {
  const bool tasks = x_.dim() == 3;
  glm::check(kName, "rows", rows, {tasks ? x_.size(0) : rows.size(0), size_}, glm::options_for(x_));
  const int64_t count = rows.size(0);
  if (count == 0) return at::empty_like(rows);
  return multiply(rows.reshape({tasks ? count : 1, tasks ? 1 : count, size_})).view({count, size_});
}

at::Tensor GlmOperator::multiply(const at::Tensor& given) {
  const at::Tensor vectors = given.contiguous();
  glm::Operands& o = operands(vectors.size(1));
  gather(vectors, o.v);
  o.multiply(kName);
  at::Tensor result =
      diagonal_.defined() ? at::mul(vectors, diagonal_.view({o.s.tasks, 1, size_})) : at::zeros_like(vectors);
  scatter(o.out, result);
  return result;
}

void GlmOperator::gather(const at::Tensor& vectors, at::Tensor& packed) const {
  const int64_t classes = positions_.size(0), width = positions_.size(1), stride = packed.size(3);
  const int64_t count = vectors.size(0) * vectors.size(1);
  if (!x_.is_cpu()) {
    const at::Tensor flat = positions_.view({-1});
    const at::Tensor picked = vectors.view({count, size_}).index_select(1, flat.clamp_min(0)).mul_(flat.ge(0));
    packed.narrow(3, 0, width).copy_(picked.view({vectors.size(0), vectors.size(1), classes, width}));
    return;
  }
  with_dtype(kName, vectors, [&](auto zero) {
    using T = decltype(zero);
    const int64_t* at = positions_.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < count; ++k) {
      const T* from = vectors.const_data_ptr<T>() + k * size_;
      T* to = packed.mutable_data_ptr<T>() + k * classes * stride;
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t d = 0; d < width; ++d) {
          const int64_t position = at[c * width + d];
          to[c * stride + d] = position < 0 ? T(0) : from[position];
        }
    }
  });
}

void GlmOperator::scatter(const at::Tensor& packed, at::Tensor& vectors) const {
  const int64_t classes = positions_.size(0), width = positions_.size(1), stride = packed.size(3);
  const int64_t count = vectors.size(0) * vectors.size(1);
  if (!x_.is_cpu()) {
    const at::Tensor flat = positions_.view({-1});
    const at::Tensor values = packed.narrow(3, 0, width).reshape({count, classes * width}).mul(flat.ge(0));
    vectors.view({count, size_}).index_add_(1, flat.clamp_min(0), values);  // a position that is not there adds zero
    return;
  }
  with_dtype(kName, vectors, [&](auto zero) {
    using T = decltype(zero);
    const int64_t* at = positions_.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < count; ++k) {
      const T* from = packed.const_data_ptr<T>() + k * classes * stride;
      T* to = vectors.mutable_data_ptr<T>() + k * size_;
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t d = 0; d < width; ++d)
          if (at[c * width + d] >= 0) to[at[c * width + d]] += from[c * stride + d];
    }
  });
}

}  // namespace mlopt
