#include "solvers.h"

#include <ATen/core/grad_mode.h>

#include "../vector/vector.h"
#include "../vector/vector_op.h"
#include "signals.h"

namespace mlopt {
namespace {

at::Tensor product(LinearOperator& a, const at::Tensor& x) { return x.dim() == 1 ? a.apply(x) : a.apply_rows(x); }

bool any_row_runs(const at::Tensor& state) {
  const at::Tensor host = state.cpu();
  const auto runs = [&](auto zero) {
    const auto* columns = host.const_data_ptr<decltype(zero)>();
    for (int64_t k = 0; k < host.numel() / kNumColumns; ++k)
      if (static_cast<int>(columns[k * kNumColumns + kStatus]) == kRunning) return true;
    return false;
  };
  return host.scalar_type() == at::kDouble ? runs(double{}) : runs(float{});
}

}  // namespace

void cg_loop(LinearOperator& a, at::Tensor x, at::Tensor r, at::Tensor p, at::Tensor state, int64_t max_steps,
             int64_t check_every) {
  const at::NoGradGuard no_grad;
  SignalPoll poll;
  at::Tensor workspace = cg_workspace(x);
  for (int64_t step = 0; step < max_steps; ++step) {
    if (step % check_every == 0 && !any_row_runs(state)) break;
    cg_step(x, r, p, product(a, p), state, workspace);
    poll();
  }
}

void neumann_loop(LinearOperator& a, at::Tensor term, at::Tensor total, int64_t num_terms, double scale) {
  const at::NoGradGuard no_grad;
  SignalPoll poll;
  for (int64_t k = 1; k < num_terms; ++k) {
    neumann_step(term, total, product(a, term), scale);
    poll();
  }
}

}  // namespace mlopt
