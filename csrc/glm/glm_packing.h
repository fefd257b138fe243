// `GlmPacking`: where the parameters of a loss lie in a flat vector, and the copies there and back.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace mlopt {

class GlmPacking {
 public:
  // positions: int64 [C, D] or, with a bias, [C, D + 1]: where each weight, and the bias of its class, lies in a vector
  // of `size` elements; -1 for a bias that is not there. Each position appears once. name: of the caller, for errors.
  GlmPacking(const char* name, const at::Tensor& positions, int64_t size, bool bias);

  // vectors [..., N], contiguous -> packed [..., C, S] (see glm.h), which stays as it is after the last feature or
  // bias.
  void gather(const at::Tensor& vectors, const at::Tensor& packed) const;
  // Adds what is packed to the vectors.
  void scatter(const at::Tensor& packed, const at::Tensor& vectors) const;

  int64_t classes() const { return positions_.size(0); }
  int64_t features() const { return positions_.size(1) - (bias_ ? 1 : 0); }
  int64_t size() const { return size_; }
  bool bias() const { return bias_; }
  at::Device device() const { return positions_.device(); }

 private:
  const char* name_;
  at::Tensor positions_;
  int64_t size_;
  bool bias_;
};

}  // namespace mlopt
