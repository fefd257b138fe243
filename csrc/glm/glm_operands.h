// Between tensors and the kernels of the family `glm`: checks, packing (see glm.h), workspaces.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <string_view>

#include "../common/binding.h"
#include "glm.h"

namespace mlopt::glm {

using Optional = std::optional<at::Tensor>;

// The sizes of a call and the shapes that go with them; leading axes [T] and [K] may be missing.
struct Sizes {
  int64_t tasks = 1, rhs = 1, rows, features, classes;
  bool batched, several, bias;
  at::TensorOptions options;  // of everything but X: the device and what is computed with

  int64_t stride() const { return glm_stride(features, bias); }
  at::IntArrayRef lead(int64_t (&sizes)[2], bool with_rhs) const {
    size_t count = 0;
    if (batched) sizes[count++] = tasks;
    if (with_rhs && several) sizes[count++] = rhs;
    return {sizes, count};
  }
  // [T?, K?, ...tail]
  at::DimVector shape(bool with_rhs, std::initializer_list<int64_t> tail) const {
    int64_t sizes[2];
    at::DimVector result(lead(sizes, with_rhs));
    result.append(tail);
    return result;
  }
};

inline GlmStorage storage_of(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? kGlmFloat16 : x.scalar_type() == at::kBFloat16 ? kGlmBFloat16 : kGlmWide;
}

// What products with X are computed with, and the device.
inline at::TensorOptions options_for(const at::Tensor& x) {
  return storage_of(x) == kGlmWide ? x.options() : x.options().dtype(at::kFloat);
}

// X as the kernels read it, see GlmProduct::x.
inline at::Tensor readable(const at::Tensor& x) { return (x.is_cpu() ? x.to(options_for(x).dtype()) : x).contiguous(); }

inline void check(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                  const at::TensorOptions& options) {
  const auto dtype = at::typeMetaToScalarType(options.dtype());
  TORCH_CHECK(tensor.sizes() == shape && tensor.scalar_type() == dtype && tensor.device() == options.device(), op,
              ": expected ", name, " of shape ", shape, ", ", dtype, ", on ", options.device(), ", got ",
              tensor.sizes(), ", ", tensor.scalar_type(), ", on ", tensor.device());
}

// `parameters` is [T?, K?, D, C], or with `products` the matrix of products [T?, K?, n, C].
inline Sizes sizes_of(const char* op, const at::Tensor& x, const at::Tensor& parameters, bool bias,
                      bool products = false) {
  TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": expected x [n, D] or [T, n, D], got ", x.sizes());
  TORCH_CHECK(parameters.dim() == x.dim() || parameters.dim() == x.dim() + 1, op, ": expected ",
              products ? "r" : "parameters", " of ", x.dim(), " or ", x.dim() + 1, " dimensions, got ",
              parameters.sizes());
  Sizes s;
  s.batched = x.dim() == 3;
  s.several = parameters.dim() > x.dim();
  s.bias = bias;
  s.rows = x.size(-2);
  s.features = x.size(-1);
  s.classes = parameters.size(-1);
  if (s.batched) s.tasks = x.size(0);
  if (s.several) s.rhs = parameters.size(s.batched ? 1 : 0);
  TORCH_CHECK(s.classes >= 1 && s.classes <= kGlmMaxClasses, op, ": expected 1 to ", kGlmMaxClasses, " classes, got ",
              s.classes);
  s.options = options_for(x);
  check(op, products ? "r" : "parameters", parameters, s.shape(true, {products ? s.rows : s.features, s.classes}),
        s.options);
  return s;
}

inline void check_optional(const char* op, const char* name, const Optional& tensor, at::IntArrayRef shape,
                           const at::TensorOptions& options) {
  if (tensor) check(op, name, *tensor, shape, options);
}

// [T?, K?, D, C] and [T?, K?, C] -> packed [T, K, C, S]; what is not given is zero.
inline at::Tensor pack(const Sizes& s, const Optional& w, const Optional& bias, int64_t rhs) {
  at::Tensor packed = at::zeros({s.tasks, rhs, s.classes, s.stride()}, s.options);
  if (w) packed.narrow(3, 0, s.features).copy_(w->reshape({s.tasks, rhs, s.features, s.classes}).transpose(2, 3));
  if (bias && s.bias) packed.select(3, s.features).copy_(bias->reshape({s.tasks, rhs, s.classes}));
  return packed;
}

inline at::Tensor unpack(const Sizes& s, const at::Tensor& packed) {
  return packed.narrow(3, 0, s.features)
      .transpose(2, 3)
      .clone(at::MemoryFormat::Contiguous)
      .view(s.shape(true, {s.features, s.classes}));
}

inline at::Tensor unpack_bias(const Sizes& s, const at::Tensor& packed) {
  if (!s.bias) return at::empty({0}, packed.options());
  return packed.select(3, s.features).clone(at::MemoryFormat::Contiguous).view(s.shape(true, {s.classes}));
}

// The tensors behind a GlmProduct, kept alive beside it.
struct Operands {
  Sizes s;
  at::Tensor x, v, out, diagonal, z, losses, partials, values, weights, labels, scales;
  GlmFunction function = kGlmIdentity;
  int64_t chunk_rows;
  bool forward = true, backward = true;

  Operands(const Sizes& sizes, const at::Tensor& x_) : s(sizes), x(readable(x_)) {
    const int64_t columns = s.rhs * s.classes;
    chunk_rows = glm_chunk_rows_cpu(s.rows, s.features, columns);
#ifdef MLOPT_WITH_CUDA
    if (!x.is_cpu()) {
      const DeviceGuard guard(x.device().index());
      chunk_rows = glm_chunk_rows_cuda(s.tasks, s.rows, s.features, s.classes, s.rhs,
                                       at::typeMetaToScalarType(s.options.dtype()) == at::kDouble);
    }
#endif
    partials =
        at::empty({s.tasks * glm_num_chunks(s.rows, chunk_rows) * glm_partial_size(columns, s.stride())}, s.options);
  }

  // H = X^T f X + reg + damping; the diagonal is packed.
  void set_curvature(const char* op, std::string_view kind, const at::Tensor& curvature, const Optional& weights_) {
    function = function_of(op, kind);
    const int64_t rows = s.rows, classes = s.classes;
    at::DimVector shape = s.shape(false, {rows, classes});
    if (function == kGlmDiagonal && curvature.dim() == x.dim() - 1) shape = s.shape(false, {rows});
    if (function == kGlmRankOne) shape = s.shape(false, {rows, 3, classes});
    if (function == kGlmBlock) shape = s.shape(false, {rows, classes, classes});
    check(op, "curvature", curvature, shape, s.options);
    values = curvature.contiguous();
    set_weights(op, weights_);
  }

  void set_diagonal(const char* op, const Optional& reg, const Optional& reg_bias, double damping) {
    check_optional(op, "reg", reg, s.shape(false, {s.features, s.classes}), s.options);
    check_optional(op, "reg_bias", reg_bias, s.shape(false, {s.classes}), s.options);
    if (!reg && !reg_bias && damping == 0) return;
    diagonal = pack(s, reg, reg_bias, 1);
    if (damping != 0) diagonal.add_(damping);
  }

  void set_loss(const char* op, std::string_view loss, const at::Tensor& targets, const Optional& weights_) {
    TORCH_CHECK(loss == "softmax" || loss == "logistic", op, ": expected loss \"softmax\" or \"logistic\", got \"",
                loss, "\"");
    if (loss == "softmax" && targets.scalar_type() == at::kLong) {
      function = kGlmSoftmaxIndex;
      check(op, "targets", targets, s.shape(false, {s.rows}), s.options.dtype(at::kLong));
      labels = targets.contiguous();
      if (x.is_cpu()) {  // elsewhere a look would wait for the device; a label out of range makes NaN there
        const int64_t* label = labels.const_data_ptr<int64_t>();
        for (int64_t k = 0; k < labels.numel(); ++k)
          TORCH_CHECK(label[k] >= 0 && label[k] < s.classes, op, ": expected targets in 0..", s.classes - 1, ", got ",
                      label[k]);
      }
    } else {
      function = loss == "softmax" ? kGlmSoftmaxDense : kGlmLogistic;
      check(op, "targets", targets, s.shape(false, {s.rows, s.classes}), s.options);
      values = targets.contiguous();
    }
    set_weights(op, weights_);
    losses = at::empty({s.tasks}, s.options);
  }

  template <typename T>
  GlmProduct<T> product() {
    const auto read = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
    const auto write = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
    GlmProduct<T> q{};
    q.x = x.const_data_ptr();
    q.storage = storage_of(x);
    q.v = read(v);
    q.diagonal = read(diagonal);
    q.out = write(out);
    q.z = write(z);
    q.losses = write(losses);
    q.partials = write(partials);
    q.rows_function = {function,
                       read(values),
                       read(weights),
                       labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr,
                       function == kGlmDiagonal && values.dim() == x.dim() - 1,
                       read(scales)};
    q.tasks = s.tasks;
    q.rows = s.rows;
    q.features = s.features;
    q.classes = s.classes;
    q.rhs = s.rhs;
    q.chunk_rows = chunk_rows;
    q.bias = s.bias;
    q.forward = forward;
    q.backward = backward;
    return q;
  }

  void multiply(const char* op) {
    with_dtype(op, partials, [&](auto zero) {
      using T = decltype(zero);
      run(op, x, product<T>(), glm_product_cpu<T>, MLOPT_CUDA(glm_product_cuda<T>));
    });
  }

 private:
  static GlmFunction function_of(const char* op, std::string_view kind) {
    if (kind == "diagonal") return kGlmDiagonal;
    if (kind == "softmax") return kGlmSoftmax;
    if (kind == "rank_one") return kGlmRankOne;
    TORCH_CHECK(kind == "block", op, ": expected kind \"diagonal\", \"softmax\", \"rank_one\" or \"block\", got \"",
                kind, "\"");
    return kGlmBlock;
  }

  void set_weights(const char* op, const Optional& weights_) {
    check_optional(op, "weights", weights_, s.shape(false, {s.rows}), s.options);
    if (weights_) weights = weights_->contiguous();
  }
};

}  // namespace mlopt::glm
