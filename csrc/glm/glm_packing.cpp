#include "glm_packing.h"

#include <ATen/ops/index_select.h>
#include <ATen/ops/mul.h>

#include <vector>

#include "../common/binding.h"
#include "glm.h"

namespace mlopt {

GlmPacking::GlmPacking(const char* name, const at::Tensor& positions, int64_t size, bool bias)
    : name_(name), positions_(positions.contiguous()), size_(size), bias_(bias) {
  TORCH_CHECK(size >= 1, name, ": expected at least one parameter, got ", size);
  TORCH_CHECK(positions.dim() == 2 && positions.scalar_type() == at::kLong && positions.size(0) >= 1 &&
                  positions.size(0) <= kGlmMaxClasses && positions.size(1) >= (bias ? 1 : 0),
              name, ": expected int64 positions [C, D", bias ? " + 1" : "", "] with C of 1 to ", kGlmMaxClasses,
              ", got ", positions.sizes(), ", ", positions.scalar_type());
  const at::Tensor host = positions_.cpu();
  std::vector<bool> taken(static_cast<size_t>(size), false);
  for (int64_t k = 0; k < host.numel(); ++k) {
    const int64_t position = host.const_data_ptr<int64_t>()[k];
    const bool is_bias = bias && k % host.size(1) == host.size(1) - 1;
    if (position == -1 && is_bias) continue;
    TORCH_CHECK(position >= 0 && position < size && !taken[static_cast<size_t>(position)], name,
                ": expected each position in 0..", size - 1, " at most once, got ", position);
    taken[static_cast<size_t>(position)] = true;
  }
}

void GlmPacking::gather(const at::Tensor& vectors, const at::Tensor& packed) const {
  const int64_t classes = positions_.size(0), width = positions_.size(1), stride = packed.size(-1);
  const int64_t count = vectors.numel() / size_;
  if (!vectors.is_cpu()) {
    const at::Tensor flat = positions_.view({-1});
    const at::Tensor picked = vectors.view({count, size_}).index_select(1, flat.clamp_min(0)).mul_(flat.ge(0));
    packed.view({count, classes, stride}).narrow(2, 0, width).copy_(picked.view({count, classes, width}));
    return;
  }
  with_dtype(name_, vectors, [&](auto zero) {
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

void GlmPacking::scatter(const at::Tensor& packed, const at::Tensor& vectors) const {
  const int64_t classes = positions_.size(0), width = positions_.size(1), stride = packed.size(-1);
  const int64_t count = vectors.numel() / size_;
  if (!vectors.is_cpu()) {
    const at::Tensor flat = positions_.view({-1});
    const at::Tensor given = packed.view({count, classes, stride}).narrow(2, 0, width);
    const at::Tensor values = given.reshape({count, classes * width}).mul(flat.ge(0));
    vectors.view({count, size_}).index_add_(1, flat.clamp_min(0), values);  // a position that is not there adds zero
    return;
  }
  with_dtype(name_, vectors, [&](auto zero) {
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
