// Tensors of the family `glm`: checks, packing (see glm.h), workspaces, registration. The kernels never see a tensor.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../common/binding.h"
#include "glm.h"

namespace mlopt {
namespace {

using Optional = std::optional<at::Tensor>;
using Two = std::tuple<at::Tensor, at::Tensor>;

// The sizes of a call and the shapes that go with them; leading axes [T] and [K] may be missing.
struct Sizes {
  int64_t tasks = 1, rhs = 1, rows, features, classes;
  bool batched, several, bias;

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

void check(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& x,
           at::ScalarType dtype) {
  TORCH_CHECK(tensor.sizes() == shape && tensor.scalar_type() == dtype && tensor.device() == x.device(), op,
              ": expected ", name, " of shape ", shape, ", ", dtype, ", on ", x.device(), ", got ", tensor.sizes(),
              ", ", tensor.scalar_type(), ", on ", tensor.device());
}

// `parameters` is [T?, K?, D, C], or with `products` the matrix of products [T?, K?, n, C].
Sizes sizes_of(const char* op, const at::Tensor& x, const at::Tensor& parameters, bool bias, bool products = false) {
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
  check(op, products ? "r" : "parameters", parameters, s.shape(true, {products ? s.rows : s.features, s.classes}), x,
        x.scalar_type());
  return s;
}

void check_optional(const char* op, const char* name, const Optional& tensor, at::IntArrayRef shape,
                    const at::Tensor& x) {
  if (tensor) check(op, name, *tensor, shape, x, x.scalar_type());
}

// [T?, K?, D, C] and [T?, K?, C] -> packed [T, K, C, S]; what is not given is zero.
at::Tensor pack(const Sizes& s, const Optional& w, const Optional& bias, const at::Tensor& like, int64_t rhs) {
  at::Tensor packed = at::zeros({s.tasks, rhs, s.classes, s.stride()}, like.options());
  if (w) packed.narrow(3, 0, s.features).copy_(w->reshape({s.tasks, rhs, s.features, s.classes}).transpose(2, 3));
  if (bias && s.bias) packed.select(3, s.features).copy_(bias->reshape({s.tasks, rhs, s.classes}));
  return packed;
}

at::Tensor unpack(const Sizes& s, const at::Tensor& packed) {
  return packed.narrow(3, 0, s.features)
      .transpose(2, 3)
      .clone(at::MemoryFormat::Contiguous)
      .view(s.shape(true, {s.features, s.classes}));
}

at::Tensor unpack_bias(const Sizes& s, const at::Tensor& packed) {
  if (!s.bias) return at::empty({0}, packed.options());
  return packed.select(3, s.features).clone(at::MemoryFormat::Contiguous).view(s.shape(true, {s.classes}));
}

// The tensors behind a GlmProduct, kept alive beside it.
struct Operands {
  Sizes s;
  at::Tensor x, v, out, diagonal, z, losses, partials, values, weights, labels;
  GlmFunction function = kGlmIdentity;
  int64_t chunk_rows;
  bool forward = true, backward = true;

  Operands(const Sizes& sizes, const at::Tensor& x_) : s(sizes), x(x_.contiguous()) {
    const int64_t columns = s.rhs * s.classes;
    chunk_rows = (x.is_cpu() ? glm_chunk_rows_cpu : glm_chunk_rows_cuda)(s.rows, s.features, columns);
    partials =
        at::empty({s.tasks * glm_num_chunks(s.rows, chunk_rows) * glm_partial_size(columns, s.stride())}, x.options());
  }

  // H = X^T f X + reg + damping; the diagonal is packed.
  void set_curvature(const char* op, std::string_view kind, const at::Tensor& curvature, const Optional& weights_) {
    const bool softmax = kind == "softmax";
    TORCH_CHECK(softmax || kind == "diagonal", op, ": expected kind \"diagonal\" or \"softmax\", got \"", kind, "\"");
    function = softmax ? kGlmSoftmax : kGlmDiagonal;
    const bool per_row = !softmax && curvature.dim() == x.dim() - 1;
    check(op, "curvature", curvature, per_row ? s.shape(false, {s.rows}) : s.shape(false, {s.rows, s.classes}), x,
          x.scalar_type());
    values = curvature.contiguous();
    set_weights(op, weights_);
  }

  void set_diagonal(const char* op, const Optional& reg, const Optional& reg_bias, double damping) {
    check_optional(op, "reg", reg, s.shape(false, {s.features, s.classes}), x);
    check_optional(op, "reg_bias", reg_bias, s.shape(false, {s.classes}), x);
    if (!reg && !reg_bias && damping == 0) return;
    diagonal = pack(s, reg, reg_bias, x, 1);
    if (damping != 0) diagonal.add_(damping);
  }

  void set_loss(const char* op, std::string_view loss, const at::Tensor& targets, const Optional& weights_) {
    TORCH_CHECK(loss == "softmax" || loss == "logistic", op, ": expected loss \"softmax\" or \"logistic\", got \"",
                loss, "\"");
    if (loss == "softmax" && targets.scalar_type() == at::kLong) {
      function = kGlmSoftmaxIndex;
      check(op, "targets", targets, s.shape(false, {s.rows}), x, at::kLong);
      labels = targets.contiguous();
      if (x.is_cpu()) {  // elsewhere a look would wait for the device; a label out of range makes NaN there
        const int64_t* label = labels.const_data_ptr<int64_t>();
        for (int64_t k = 0; k < labels.numel(); ++k)
          TORCH_CHECK(label[k] >= 0 && label[k] < s.classes, op, ": expected targets in 0..", s.classes - 1, ", got ",
                      label[k]);
      }
    } else {
      function = loss == "softmax" ? kGlmSoftmaxDense : kGlmLogistic;
      check(op, "targets", targets, s.shape(false, {s.rows, s.classes}), x, x.scalar_type());
      values = targets.contiguous();
    }
    set_weights(op, weights_);
    losses = at::empty({s.tasks}, x.options());
  }

  template <typename T>
  GlmProduct<T> product() {
    const auto read = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
    const auto write = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
    GlmProduct<T> q{};
    q.x = read(x);
    q.v = read(v);
    q.diagonal = read(diagonal);
    q.out = write(out);
    q.z = write(z);
    q.losses = write(losses);
    q.partials = write(partials);
    q.rows_function = {function, read(values), read(weights),
                       labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr,
                       function == kGlmDiagonal && values.dim() == x.dim() - 1};
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
    with_dtype(op, x, [&](auto zero) {
      using T = decltype(zero);
      run(op, x, product<T>(), glm_product_cpu<T>, MLOPT_CUDA(glm_product_cuda<T>));
    });
  }

 private:
  void set_weights(const char* op, const Optional& weights_) {
    check_optional(op, "weights", weights_, s.shape(false, {s.rows}), x);
    if (weights_) weights = weights_->contiguous();
  }
};

at::Tensor glm_matmul(const at::Tensor& x, const at::Tensor& w, const Optional& bias) {
  const char* op = "mlopt::glm_matmul";
  const Sizes s = sizes_of(op, x, w, bias.has_value());
  check_optional(op, "bias", bias, s.shape(true, {s.classes}), x);
  Operands o(s, x);
  o.v = pack(s, w, bias, x, s.rhs);
  o.z = at::empty(s.shape(true, {s.rows, s.classes}), x.options());
  o.backward = false;
  o.multiply(op);
  return o.z;
}

Two glm_matmul_t(const at::Tensor& x, const at::Tensor& r, bool bias) {
  const char* op = "mlopt::glm_matmul_t";
  const Sizes s = sizes_of(op, x, r, bias, true);
  Operands o(s, x);
  o.z = r.contiguous();
  o.out = at::empty({s.tasks, s.rhs, s.classes, s.stride()}, x.options());
  o.forward = false;
  o.multiply(op);
  return {unpack(s, o.out), unpack_bias(s, o.out)};
}

// The operands of a product with H, its input packed.
Operands curvature_operands(const char* op, const at::Tensor& x, const at::Tensor& v, const Optional& v_bias,
                            std::string_view kind, const at::Tensor& curvature, const Optional& weights,
                            const Optional& reg, const Optional& reg_bias, double damping) {
  const Sizes s = sizes_of(op, x, v, v_bias.has_value());
  check_optional(op, "v_bias", v_bias, s.shape(true, {s.classes}), x);
  Operands o(s, x);
  o.set_curvature(op, kind, curvature, weights);
  o.set_diagonal(op, reg, reg_bias, damping);
  o.v = pack(s, v, v_bias, x, s.rhs);
  o.out = at::empty(o.v.sizes(), x.options());
  return o;
}

Two glm_hvp(const at::Tensor& x, const at::Tensor& v, const Optional& v_bias, std::string_view kind,
            const at::Tensor& curvature, const Optional& weights, const Optional& reg, const Optional& reg_bias) {
  const char* op = "mlopt::glm_hvp";
  Operands o = curvature_operands(op, x, v, v_bias, kind, curvature, weights, reg, reg_bias, 0);
  o.multiply(op);
  return {unpack(o.s, o.out), unpack_bias(o.s, o.out)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> glm_gradient(const at::Tensor& x, const at::Tensor& w,
                                                                        const Optional& bias, std::string_view loss,
                                                                        const at::Tensor& targets,
                                                                        const Optional& weights) {
  const char* op = "mlopt::glm_gradient";
  const Sizes s = sizes_of(op, x, w, bias.has_value());
  TORCH_CHECK(!s.several, op, ": expected w with one set of parameters per task, got ", w.sizes());
  check_optional(op, "bias", bias, s.shape(true, {s.classes}), x);
  Operands o(s, x);
  o.set_loss(op, loss, targets, weights);
  o.v = pack(s, w, bias, x, 1);
  o.out = at::empty(o.v.sizes(), x.options());
  o.z = at::empty(s.shape(false, {s.rows, s.classes}), x.options());
  o.multiply(op);
  return {o.losses.view(s.shape(false, {})), unpack(s, o.out), unpack_bias(s, o.out), o.z};
}

at::Tensor norms2(const at::Tensor& packed) { return packed.mul(packed).sum(at::IntArrayRef({2, 3})); }  // [T, K]

std::tuple<at::Tensor, at::Tensor, at::Tensor> glm_cg(const at::Tensor& x, const at::Tensor& b, const Optional& b_bias,
                                                      const Optional& q0, const Optional& q0_bias,
                                                      std::string_view kind, const at::Tensor& curvature,
                                                      const Optional& weights, const Optional& reg,
                                                      const Optional& reg_bias, double damping, double rtol,
                                                      int64_t max_steps) {
  const char* op = "mlopt::glm_cg";
  Operands o = curvature_operands(op, x, b, b_bias, kind, curvature, weights, reg, reg_bias, damping);
  const Sizes& s = o.s;
  TORCH_CHECK(rtol >= 0 && max_steps >= 0, op, ": expected rtol >= 0 and max_steps >= 0, got ", rtol, ", ", max_steps);
  check_optional(op, "q0", q0, b.sizes(), x);
  check_optional(op, "q0_bias", q0_bias, s.shape(true, {s.classes}), x);
  at::Tensor q = at::zeros(o.v.sizes(), x.options()), r = o.v.clone(), p = o.v;
  const at::Tensor size2 = norms2(r);
  if (q0) {  // where it is the worse start, or not finite, zero is taken
    o.v = pack(s, q0, q0_bias, x, s.rhs);
    o.multiply(op);
    const at::Tensor residual = r.sub(o.out), good = norms2(residual).le(size2).unsqueeze(-1).unsqueeze(-1);
    q = at::where(good, o.v, q).contiguous();
    r = at::where(good, residual, r).contiguous();
    p = r.clone();
    o.v = p;
  }
  at::Tensor state = at::zeros({s.tasks, s.rhs, int64_t(kNumColumns)}, x.options());
  const at::Tensor rr = norms2(r), tolerance2 = size2.mul(rtol * rtol);
  state.select(2, kRR).copy_(rr);
  state.select(2, kTolerance2).copy_(tolerance2);
  state.select(2, kStatus).copy_(rr.le(tolerance2));  // kConverged is 1
  at::Tensor partials = at::empty({2, s.tasks * s.rhs * num_blocks(s.classes * s.stride())}, x.options());
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    T* first = partials.mutable_data_ptr<T>();
    const GlmCg<T> params{o.product<T>(),
                          q.mutable_data_ptr<T>(),
                          r.mutable_data_ptr<T>(),
                          p.mutable_data_ptr<T>(),
                          state.mutable_data_ptr<T>(),
                          first,
                          first + partials.size(1),
                          max_steps};
    run(op, x, params, glm_cg_cpu<T>, MLOPT_CUDA(glm_cg_cuda<T>));
  });
  return {unpack(s, q), unpack_bias(s, q), state.view(s.shape(true, {int64_t(kNumColumns)}))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> glm_neumann(const at::Tensor& x, const at::Tensor& b,
                                                           const Optional& b_bias, std::string_view kind,
                                                           const at::Tensor& curvature, const Optional& weights,
                                                           const Optional& reg, const Optional& reg_bias,
                                                           double damping, double scale, int64_t num_terms) {
  const char* op = "mlopt::glm_neumann";
  Operands o = curvature_operands(op, x, b, b_bias, kind, curvature, weights, reg, reg_bias, damping);
  TORCH_CHECK(num_terms >= 1, op, ": expected num_terms >= 1, got ", num_terms);
  at::Tensor acc = o.v.clone();
  const at::Tensor start = norms2(acc);
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    const GlmNeumann<T> params{o.product<T>(), o.v.mutable_data_ptr<T>(), acc.mutable_data_ptr<T>(),
                               static_cast<T>(scale), num_terms};
    run(op, x, params, glm_neumann_cpu<T>, MLOPT_CUDA(glm_neumann_cuda<T>));
  });
  acc.mul_(scale);
  const at::Tensor ratio = at::where(start.gt(0), norms2(o.v).div(start).sqrt(), at::zeros_like(start));
  return {unpack(o.s, acc), unpack_bias(o.s, acc), ratio.view(o.s.shape(true, {}))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> glm_gd(
    const at::Tensor& x, const at::Tensor& w, const Optional& bias, const Optional& velocity,
    const Optional& velocity_bias, std::string_view loss, const at::Tensor& targets, const Optional& weights,
    const Optional& reg, const Optional& reg_bias, double lr, double momentum, int64_t num_steps) {
  const char* op = "mlopt::glm_gd";
  const Sizes s = sizes_of(op, x, w, bias.has_value());
  TORCH_CHECK(!s.several, op, ": expected w with one set of parameters per task, got ", w.sizes());
  TORCH_CHECK(num_steps >= 0, op, ": expected num_steps >= 0, got ", num_steps);
  check_optional(op, "bias", bias, s.shape(true, {s.classes}), x);
  check_optional(op, "velocity", velocity, w.sizes(), x);
  check_optional(op, "velocity_bias", velocity_bias, s.shape(true, {s.classes}), x);
  Operands o(s, x);
  o.set_loss(op, loss, targets, weights);
  o.set_diagonal(op, reg, reg_bias, 0);
  o.v = pack(s, w, bias, x, 1);
  o.out = at::empty(o.v.sizes(), x.options());
  at::Tensor moving = pack(s, velocity, velocity_bias, x, 1);
  at::Tensor losses = at::empty({num_steps, s.tasks}, x.options());
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    const GlmDescent<T> params{o.product<T>(),
                               o.v.mutable_data_ptr<T>(),
                               moving.mutable_data_ptr<T>(),
                               losses.mutable_data_ptr<T>(),
                               static_cast<T>(lr),
                               static_cast<T>(momentum),
                               num_steps};
    run(op, x, params, glm_descent_cpu<T>, MLOPT_CUDA(glm_descent_cuda<T>));
  });
  if (!s.batched) losses = losses.view({num_steps});
  return {unpack(s, o.v), unpack_bias(s, o.v), unpack(s, moving), unpack_bias(s, moving), losses};
}

void register_kernels(torch::Library& m) {
  m.impl("glm_matmul", TORCH_FN(glm_matmul));
  m.impl("glm_matmul_t", TORCH_FN(glm_matmul_t));
  m.impl("glm_hvp", TORCH_FN(glm_hvp));
  m.impl("glm_gradient", TORCH_FN(glm_gradient));
  m.impl("glm_cg", TORCH_FN(glm_cg));
  m.impl("glm_neumann", TORCH_FN(glm_neumann));
  m.impl("glm_gd", TORCH_FN(glm_gd));
}

}  // namespace

TORCH_LIBRARY_IMPL(mlopt, CPU, m) { register_kernels(m); }
#ifdef MLOPT_WITH_CUDA
TORCH_LIBRARY_IMPL(mlopt, CUDA, m) { register_kernels(m); }
#endif

}  // namespace mlopt
