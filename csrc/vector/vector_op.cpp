// Tensors of the family `vector`: checks, dtype dispatch, workspaces, registration. The kernels never see a tensor.
#include "vector_op.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <initializer_list>
#include <utility>

#include "../common/binding.h"
#include "vector.h"

namespace mlopt {
namespace {

struct Shape {
  int64_t rows, n;
  c10::SmallVector<int64_t, 1> scalars;  // sizes of a per-row scalar: [] or [K]
};

Shape shape_of(const char* op, const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 1 || x.dim() == 2, op, ": expected vectors [N] or rows [K, N], got ", x.dim(), " dimensions");
  if (x.dim() == 1) return {1, x.size(0), {}};
  return {x.size(0), x.size(1), {x.size(0)}};
}

void check_like(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first) {
  TORCH_CHECK(x.sizes() == first.sizes(), op, ": expected ", name, " of shape ", first.sizes(), ", got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == first.scalar_type(), op, ": expected ", name, " of dtype ", first.scalar_type(),
              ", got ", x.scalar_type());
  TORCH_CHECK(x.device() == first.device(), op, ": expected ", name, " on ", first.device(), ", got ", x.device());
}

// The addresses between a tensor's first and last element.
std::pair<const char*, const char*> span(const at::Tensor& x) {
  const auto* first = static_cast<const char*>(x.const_data_ptr());
  int64_t last = 0;
  for (int64_t k = 0; k < x.dim(); ++k) last += (x.size(k) - 1) * x.stride(k);
  return {first, first + (last + 1) * static_cast<int64_t>(x.element_size())};
}

struct Named {
  const char* name;
  const at::Tensor& tensor;
};

// A written tensor is contiguous and shares memory with no other argument: kernels read one while they write another.
void check_written(const char* op, std::initializer_list<Named> written, std::initializer_list<Named> read) {
  const auto check_apart = [op](const Named& a, const Named& b) {
    if (&a == &b || a.tensor.numel() == 0 || b.tensor.numel() == 0) return;
    const auto [a_begin, a_end] = span(a.tensor);
    const auto [b_begin, b_end] = span(b.tensor);
    TORCH_CHECK(a_end <= b_begin || b_end <= a_begin, op, ": ", a.name, " is written and shares memory with ", b.name);
  };
  for (const Named& a : written) {
    TORCH_CHECK(a.tensor.is_contiguous(), op, ": ", a.name, " is written and must be contiguous, got strides ",
                a.tensor.strides());
    for (const Named& b : written) check_apart(a, b);
    for (const Named& b : read) check_apart(a, b);
  }
}

void check_scalars(const char* op, const char* name, const at::Tensor& x, const Shape& shape, const at::Tensor& first) {
  TORCH_CHECK(x.sizes() == at::IntArrayRef(shape.scalars), op, ": expected ", name, " of shape ",
              at::IntArrayRef(shape.scalars), ", got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == first.scalar_type() && x.device() == first.device(), op, ": expected ", name,
              " like the vectors in dtype and device");
}

at::Tensor dot_or_norm(const char* op, const at::Tensor& a_, const at::Tensor& b_, bool take_sqrt) {
  const Shape shape = shape_of(op, a_);
  check_like(op, "b", b_, a_);
  const at::Tensor a = a_.contiguous(), b = take_sqrt ? a : b_.contiguous();
  at::Tensor out = at::empty(shape.scalars, a.options());
  at::Tensor partials = at::empty({shape.rows * num_blocks(shape.n)}, a.options());
  with_dtype(op, a, [&](auto zero) {
    using T = decltype(zero);
    const DotParams<T> params{a.const_data_ptr<T>(),
                              b.const_data_ptr<T>(),
                              out.mutable_data_ptr<T>(),
                              partials.mutable_data_ptr<T>(),
                              shape.rows,
                              shape.n,
                              take_sqrt};
    run(op, a, params, dot_cpu<T>, MLOPT_CUDA(dot_cuda<T>));
  });
  return out;
}

void cg_step_(at::Tensor& x, at::Tensor& r, at::Tensor& p, const at::Tensor& ap, at::Tensor& state) {
  at::Tensor workspace = cg_workspace(x);
  cg_step(x, r, p, ap, state, workspace);
}

void neumann_step_(at::Tensor& v, at::Tensor& acc, const at::Tensor& av, double scale) {
  neumann_step(v, acc, av, scale);
}

at::Tensor perturb(const at::Tensor& x_, const at::Tensor& direction_, const at::Tensor& step_) {
  const char* op = "mlopt::perturb";
  const Shape shape = shape_of(op, x_);
  check_like(op, "direction", direction_, x_);
  check_scalars(op, "step", step_, shape, x_);
  const at::Tensor x = x_.contiguous(), direction = direction_.contiguous(), step = step_.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    const PerturbParams<T> params{x.const_data_ptr<T>(),
                                  direction.const_data_ptr<T>(),
                                  step.const_data_ptr<T>(),
                                  out.mutable_data_ptr<T>(),
                                  shape.rows,
                                  shape.n};
    run(op, x, params, perturb_cpu<T>, MLOPT_CUDA(perturb_cuda<T>));
  });
  return out;
}

}  // namespace

at::Tensor dot(const at::Tensor& a, const at::Tensor& b) { return dot_or_norm("mlopt::dot", a, b, false); }

at::Tensor norm(const at::Tensor& a) { return dot_or_norm("mlopt::norm", a, a, true); }

namespace {

void register_kernels(torch::Library& m) {
  m.impl("dot", TORCH_FN(dot));
  m.impl("norm", TORCH_FN(norm));
  m.impl("cg_step_", TORCH_FN(cg_step_));
  m.impl("neumann_step_", TORCH_FN(neumann_step_));
  m.impl("perturb", TORCH_FN(perturb));
}

}  // namespace

at::Tensor cg_workspace(const at::Tensor& x) {
  const Shape shape = shape_of("mlopt::cg_step_", x);
  return at::empty({2, shape.rows * num_blocks(shape.n)}, x.options());
}

void cg_step(at::Tensor& x, at::Tensor& r, at::Tensor& p, const at::Tensor& ap_, at::Tensor& state,
             at::Tensor& workspace) {
  const char* op = "mlopt::cg_step_";
  const Shape shape = shape_of(op, x);
  check_like(op, "r", r, x);
  check_like(op, "p", p, x);
  check_like(op, "ap", ap_, x);
  check_written(op, {{"x", x}, {"r", r}, {"p", p}, {"state", state}}, {{"ap", ap_}});
  TORCH_CHECK(state.numel() == shape.rows * kNumColumns && state.scalar_type() == x.scalar_type() &&
                  state.device() == x.device(),
              op, ": expected state of ", kNumColumns, " columns per row, like the vectors in dtype and device, got ",
              state.sizes());
  const at::Tensor ap = ap_.contiguous();
  with_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    T* partials = workspace.mutable_data_ptr<T>();
    const CgParams<T> params{x.mutable_data_ptr<T>(),
                             r.mutable_data_ptr<T>(),
                             p.mutable_data_ptr<T>(),
                             ap.const_data_ptr<T>(),
                             state.mutable_data_ptr<T>(),
                             partials,
                             partials + shape.rows * num_blocks(shape.n),
                             shape.rows,
                             shape.n};
    run(op, x, params, cg_step_cpu<T>, MLOPT_CUDA(cg_step_cuda<T>));
  });
}

void neumann_step(at::Tensor& v, at::Tensor& acc, const at::Tensor& av_, double scale) {
  const char* op = "mlopt::neumann_step_";
  shape_of(op, v);
  check_like(op, "acc", acc, v);
  check_like(op, "av", av_, v);
  check_written(op, {{"v", v}, {"acc", acc}}, {{"av", av_}});
  const at::Tensor av = av_.contiguous();
  with_dtype(op, v, [&](auto zero) {
    using T = decltype(zero);
    const NeumannParams<T> params{v.mutable_data_ptr<T>(), acc.mutable_data_ptr<T>(), av.const_data_ptr<T>(),
                                  static_cast<T>(scale), v.numel()};
    run(op, v, params, neumann_step_cpu<T>, MLOPT_CUDA(neumann_step_cuda<T>));
  });
}

TORCH_LIBRARY_IMPL(mlopt, CPU, m) { register_kernels(m); }
#ifdef MLOPT_WITH_CUDA
TORCH_LIBRARY_IMPL(mlopt, CUDA, m) { register_kernels(m); }
#endif

}  // namespace mlopt
