// The ops of the family `glm` and their registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "glm_operands.h"

namespace mlopt {
namespace {

using namespace glm;  // NOLINT: this file is what the header is for
using Two = std::tuple<at::Tensor, at::Tensor>;

at::Tensor glm_matmul(const at::Tensor& x, const at::Tensor& w, const Optional& bias) {
  const char* op = "mlopt::glm_matmul";
  const Sizes s = sizes_of(op, x, w, bias.has_value());
  check_optional(op, "bias", bias, s.shape(true, {s.classes}), s.options);
  Operands o(s, x);
  o.v = pack(s, w, bias, s.rhs);
  o.z = at::empty(s.shape(true, {s.rows, s.classes}), s.options);
  o.backward = false;
  o.multiply(op);
  return o.z;
}

Two glm_matmul_t(const at::Tensor& x, const at::Tensor& r, bool bias) {
  const char* op = "mlopt::glm_matmul_t";
  const Sizes s = sizes_of(op, x, r, bias, true);
  Operands o(s, x);
  o.z = r.contiguous();
  o.out = at::empty({s.tasks, s.rhs, s.classes, s.stride()}, s.options);
  o.forward = false;
  o.multiply(op);
  return {unpack(s, o.out), unpack_bias(s, o.out)};
}

// The operands of a product with H, its input packed.
Operands curvature_operands(const char* op, const at::Tensor& x, const at::Tensor& v, const Optional& v_bias,
                            std::string_view kind, const at::Tensor& curvature, const Optional& weights,
                            const Optional& reg, const Optional& reg_bias, double damping) {
  const Sizes s = sizes_of(op, x, v, v_bias.has_value());
  check_optional(op, "v_bias", v_bias, s.shape(true, {s.classes}), s.options);
  Operands o(s, x);
  o.set_curvature(op, kind, curvature, weights);
  o.set_diagonal(op, reg, reg_bias, damping);
  o.v = pack(s, v, v_bias, s.rhs);
  o.out = at::empty(o.v.sizes(), s.options);
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
  check_optional(op, "bias", bias, s.shape(true, {s.classes}), s.options);
  Operands o(s, x);
  o.set_loss(op, loss, targets, weights);
  o.v = pack(s, w, bias, 1);
  o.out = at::empty(o.v.sizes(), s.options);
  o.z = at::empty(s.shape(false, {s.rows, s.classes}), s.options);
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
  check_optional(op, "q0", q0, b.sizes(), s.options);
  check_optional(op, "q0_bias", q0_bias, s.shape(true, {s.classes}), s.options);
  at::Tensor q = at::zeros(o.v.sizes(), s.options), r = o.v.clone(), p = o.v;
  const at::Tensor size2 = norms2(r);
  if (q0) {  // where it is the worse start, or not finite, zero is taken
    o.v = pack(s, q0, q0_bias, s.rhs);
    o.multiply(op);
    const at::Tensor residual = r.sub(o.out), good = norms2(residual).le(size2).unsqueeze(-1).unsqueeze(-1);
    q = at::where(good, o.v, q).contiguous();
    r = at::where(good, residual, r).contiguous();
    p = r.clone();
    o.v = p;
  }
  at::Tensor state = at::zeros({s.tasks, s.rhs, int64_t(kNumColumns)}, s.options);
  const at::Tensor rr = norms2(r), tolerance2 = size2.mul(rtol * rtol);
  state.select(2, kRR).copy_(rr);
  state.select(2, kTolerance2).copy_(tolerance2);
  state.select(2, kStatus).copy_(rr.le(tolerance2));  // kConverged is 1
  at::Tensor partials = at::empty({2, s.tasks * s.rhs * num_blocks(s.classes * s.stride())}, s.options);
  with_dtype(op, o.partials, [&](auto zero) {
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
  with_dtype(op, o.partials, [&](auto zero) {
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
  check_optional(op, "bias", bias, s.shape(true, {s.classes}), s.options);
  check_optional(op, "velocity", velocity, w.sizes(), s.options);
  check_optional(op, "velocity_bias", velocity_bias, s.shape(true, {s.classes}), s.options);
  Operands o(s, x);
  o.set_loss(op, loss, targets, weights);
  o.set_diagonal(op, reg, reg_bias, 0);
  o.v = pack(s, w, bias, 1);
  o.out = at::empty(o.v.sizes(), s.options);
  at::Tensor moving = pack(s, velocity, velocity_bias, 1);
  at::Tensor losses = at::empty({num_steps, s.tasks}, s.options);
  at::Tensor coefficients = at::zeros({2, 4, s.classes, s.stride()}, s.options);  // see GlmDescent
  coefficients[0][2].fill_(-lr * momentum);
  coefficients[0][3].fill_(-lr);
  coefficients[1][2].fill_(momentum);
  coefficients[1][3].fill_(1);
  with_dtype(op, o.partials, [&](auto zero) {
    using T = decltype(zero);
    const GlmDescent<T> params{o.product<T>(),
                               o.v.mutable_data_ptr<T>(),
                               moving.mutable_data_ptr<T>(),
                               coefficients.const_data_ptr<T>(),
                               losses.mutable_data_ptr<T>(),
                               nullptr,
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
