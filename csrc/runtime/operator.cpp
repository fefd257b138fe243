#include "operator.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include "repeated.h"

namespace py = pybind11;

namespace mlopt {

at::Tensor LinearOperator::apply_rows(const at::Tensor& rows) {
  if (!rows_.defined() || rows_.sizes() != rows.sizes() || rows_.options().dtype() != rows.options().dtype())
    rows_ = at::empty_like(rows, at::MemoryFormat::Contiguous);
  for (int64_t k = 0; k < rows.size(0); ++k) rows_.select(0, k).copy_(apply(rows.select(0, k)));
  return rows_;
}

at::Tensor PackageOperator::apply_rows(const at::Tensor& rows) {
  return layout_.sizes.size() == 2 ? apply(rows) : LinearOperator::apply_rows(rows);
}

at::Tensor PackageOperator::apply(const at::Tensor& vector) {
  std::vector<at::Tensor> inputs = inputs_;
  inputs[hole_] = package_->fit(hole_, vector, layout_);
  return package_->run(std::move(inputs)).at(0);
}

bool PackageOperator::worth_recording() const { return mlopt::worth_recording(inputs_); }

at::Tensor CallbackOperator::apply(const at::Tensor& vector) {
  const py::gil_scoped_acquire gil;
  return function_(vector).cast<at::Tensor>();
}

at::Tensor DampedOperator::apply(const at::Tensor& vector) { return damped(inner_->apply(vector), vector); }

at::Tensor DampedOperator::apply_rows(const at::Tensor& rows) { return damped(inner_->apply_rows(rows), rows); }

const at::Tensor& DampedOperator::damped(const at::Tensor& product, const at::Tensor& vector) {
  if (!result_.defined() || result_.sizes() != vector.sizes() || result_.options().dtype() != vector.options().dtype())
    result_ = at::empty_like(vector, at::MemoryFormat::Contiguous);
  return at::add_out(result_, product, vector, damping_);
}

}  // namespace mlopt
