#include "solvers.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "../vector/vector.h"
#include "../vector/vector_op.h"
#include "repeated.h"
#include "signals.h"
#include "workspace.h"

namespace mlopt {
namespace {

at::Tensor product(LinearOperator& a, const at::Tensor& x) { return x.dim() == 1 ? a.apply(x) : a.apply_rows(x); }

pybind11::handle recorder_for(const LinearOperator& a, pybind11::handle recorder) {
  return a.worth_recording() ? recorder : pybind11::handle();
}

bool any_row_runs(const at::Tensor& state) {
  const at::Tensor host = state.is_cpu() ? state : state.cpu();
  const auto runs = [&](auto zero) {
    const auto* columns = host.const_data_ptr<decltype(zero)>();
    for (int64_t k = 0; k < host.numel() / kNumColumns; ++k)
      if (static_cast<int>(columns[k * kNumColumns + kStatus]) == kRunning) return true;
    return false;
  };
  return host.scalar_type() == at::kDouble ? runs(double{}) : runs(float{});
}

// The state before the first step, [5] or [K, 5]; what mlopt.ops.cg_init makes.
at::Tensor first_state(const at::Tensor& rr, const at::Tensor& tolerance) {
  std::vector<int64_t> sizes = rr.sizes().vec();
  sizes.push_back(kNumColumns);
  at::Tensor state = at::zeros(sizes, rr.options());
  if (!rr.is_cpu()) {
    const at::Tensor tolerance2 = at::mul(tolerance, tolerance);
    state.select(-1, kRR).copy_(rr);
    state.select(-1, kTolerance2).copy_(tolerance2);
    state.select(-1, kStatus).copy_(rr.le(tolerance2));  // kConverged is 1
    return state;
  }
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    T* columns = state.mutable_data_ptr<T>();
    const T *squares = rr.const_data_ptr<T>(), *tolerances = tolerance.const_data_ptr<T>();
    for (int64_t k = 0; k < rr.numel(); ++k, columns += kNumColumns) {
      columns[kRR] = squares[k];
      columns[kTolerance2] = tolerances[k] * tolerances[k];
      columns[kStatus] = T(squares[k] <= columns[kTolerance2] ? kConverged : kRunning);
    }
  };
  rr.scalar_type() == at::kDouble ? fill(double{}) : fill(float{});
  return state;
}

}  // namespace

CgResult cg_solve(LinearOperator& a, const at::Tensor& b, const std::optional<std::pair<at::Tensor, at::Tensor>>& start,
                  double rtol, int64_t max_steps, int64_t check_every, pybind11::handle recorder) {
  const at::NoGradGuard no_grad;
  const WorkspaceScope scope;
  SignalPoll poll;
  const at::Tensor scale = norm(b);
  at::Tensor x, r;
  if (start) {
    const at::Tensor good = norm(start->second).le(scale).unsqueeze(-1);  // false for a residual that is not finite
    x = at::where(good, start->first, at::zeros_like(b)).contiguous();
    r = at::where(good, start->second, b).contiguous();
  } else {
    x = at::zeros(b.sizes(), b.options());
    r = at::empty(b.sizes(), b.options()).copy_(b);
  }
  at::Tensor p = r.clone();
  at::Tensor state = first_state(dot(r, r), at::mul(scale, rtol));
  at::Tensor workspace = cg_workspace(x);
  Repeated make_step(recorder_for(a, recorder), max_steps, [&] { cg_step(x, r, p, product(a, p), state, workspace); });
  for (int64_t step = 0; step < max_steps; ++step) {
    if (step % check_every == 0 && !any_row_runs(state)) break;
    make_step();
    poll();
  }
  return {x, state, scale};
}

void neumann_loop(LinearOperator& a, at::Tensor term, at::Tensor total, int64_t num_terms, double scale,
                  pybind11::handle recorder) {
  const at::NoGradGuard no_grad;
  const WorkspaceScope scope;
  SignalPoll poll;
  Repeated make_step(recorder_for(a, recorder), num_terms - 1,
                     [&] { neumann_step(term, total, product(a, term), scale); });
  for (int64_t k = 1; k < num_terms; ++k) {
    make_step();
    poll();
  }
}

}  // namespace mlopt
