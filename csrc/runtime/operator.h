// What the native solver loops see of a matrix, and the operators that are not kernels of their own.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "package.h"

namespace mlopt {

// A square linear map on vectors [N], or T of them side by side on the rows of [T, N]. Both functions are called
// without the GIL and return a tensor that the caller must not write; it may be one that the next call overwrites.
class LinearOperator {
 public:
  virtual ~LinearOperator() = default;
  virtual at::Tensor apply(const at::Tensor& vector) = 0;  // [N] -> [N]

  // Whether a product always launches the same kernels on the same tensors, and is small: it pays to record it then
  // (see repeated.h).
  virtual bool worth_recording() const { return false; }

  // [K, N] -> [K, N]: one map on every row, or map t on row t. By default `apply` on each row.
  virtual at::Tensor apply_rows(const at::Tensor& rows);

 private:
  at::Tensor rows_;
};

// An AOTInductor package with one free input and one output: a vector, or the rows of T maps. The other inputs are
// fixed.
class PackageOperator final : public LinearOperator {
 public:
  PackageOperator(std::shared_ptr<Package> package, std::vector<at::Tensor> inputs, size_t hole, Layout layout)
      : package_(std::move(package)), inputs_(std::move(inputs)), hole_(hole), layout_(std::move(layout)) {}

  at::Tensor apply(const at::Tensor& vector) override;
  at::Tensor apply_rows(const at::Tensor& rows) override;
  bool worth_recording() const override;

 private:
  std::shared_ptr<Package> package_;
  std::vector<at::Tensor> inputs_;
  size_t hole_;
  Layout layout_;
};

// A Python function.
class CallbackOperator final : public LinearOperator {
 public:
  explicit CallbackOperator(pybind11::function function) : function_(std::move(function)) {}

  at::Tensor apply(const at::Tensor& vector) override;

 private:
  pybind11::function function_;
};

// A + damping I.
class DampedOperator final : public LinearOperator {
 public:
  DampedOperator(std::shared_ptr<LinearOperator> inner, double damping) : inner_(std::move(inner)), damping_(damping) {}

  at::Tensor apply(const at::Tensor& vector) override;
  at::Tensor apply_rows(const at::Tensor& rows) override;
  bool worth_recording() const override { return inner_->worth_recording(); }

 private:
  const at::Tensor& damped(const at::Tensor& product, const at::Tensor& vector);

  std::shared_ptr<LinearOperator> inner_;
  double damping_;
  at::Tensor result_;
};

}  // namespace mlopt
