#include "operator.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

namespace mlopt {

at::Tensor PackageOperator::apply(const at::Tensor& vector) {
  std::vector<at::Tensor> inputs = inputs_;
  inputs[hole_] = package_->fit(hole_, vector, layout_);
  return package_->run(std::move(inputs)).at(0);
}

at::Tensor CallbackOperator::apply(const at::Tensor& vector) {
  const py::gil_scoped_acquire gil;
  return function_(vector).cast<at::Tensor>();
}

at::Tensor DampedOperator::apply(const at::Tensor& vector) {
  const at::Tensor product = inner_->apply(vector);
  if (!result_.defined() || result_.sizes() != vector.sizes() || result_.options().dtype() != vector.options().dtype())
    result_ = at::empty_like(vector, at::MemoryFormat::Contiguous);
  return at::add_out(result_, product, vector, damping_);
}

}  // namespace mlopt
