// Family `vector`: the updates of iterative solvers on K independent rows of N elements. Torch-free.
//
// This header owns the arithmetic (shared by CPU and CUDA), the parameter structs and the prototypes of the kernels.
// All tensors are contiguous [K, N]; T is float or double and is also the type of per-row scalars. Sums are taken over
// fixed blocks of kBlock elements and then over the blocks in order, so their bits depend neither on the number of
// threads nor on a repeat.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/parallel.h"

using mlopt_stream = void*;  // a cudaStream_t, without the CUDA headers

namespace mlopt {

constexpr int64_t kBlock = 4096;  // elements per partial sum: 16 to 32 KiB per operand, inside a first-level cache

// At least one, so that a row of no elements has a sum too.
MLOPT_HD int64_t num_blocks(int64_t n) { return n <= kBlock ? 1 : (n + kBlock - 1) / kBlock; }

// Columns of the state of conjugate gradients, [K, kNumColumns].
enum Column : int { kRR = 0, kTolerance2 = 1, kStatus = 2, kNumSteps = 3, kPAP = 4, kNumColumns = 5 };
enum Status : int { kRunning = 0, kConverged = 1, kBreakdown = 2, kNonFinite = 3 };

template <typename T>
struct DotParams {
  const T* a;   // [K, N]
  const T* b;   // [K, N]
  T* out;       // [K]
  T* partials;  // workspace [K, num_blocks(N)]
  int64_t rows, n;
  bool take_sqrt;  // norm: b == a and out is the root
};

template <typename T>
struct CgParams {
  T* x;             // [K, N]
  T* r;             // [K, N]
  T* p;             // [K, N]
  const T* ap;      // [K, N]
  T* state;         // [K, kNumColumns]
  T* pap_partials;  // workspace [K, num_blocks(N)]
  T* rr_partials;   // workspace [K, num_blocks(N)]
  int64_t rows, n;
};

template <typename T>
struct NeumannParams {
  T* v;         // [K, N]
  T* acc;       // [K, N]
  const T* av;  // [K, N]
  T scale;
  int64_t numel;  // K * N
};

template <typename T>
struct PerturbParams {
  const T* x;          // [K, N]
  const T* direction;  // [K, N]
  const T* step;       // [K]
  T* out;              // [K, N]
  int64_t rows, n;
};

template <typename T>
MLOPT_HD bool is_finite(T value) {
  return value - value == T(0);  // false for infinities and NaN; needs no header that differs between host and device
}

// What one row does in one step of conjugate gradients, decided by its state before the step and p.Ap alone.
template <typename T>
struct CgDecision {
  Status status;  // after the decision; kRunning means that the step is made
  T alpha;        // 0 unless the step is made
};

template <typename T>
MLOPT_HD CgDecision<T> cg_decide(const T* state, T pap) {
  const Status before = static_cast<Status>(static_cast<int>(state[kStatus]));
  if (before != kRunning) return {before, T(0)};
  if (!is_finite(pap) || !is_finite(state[kRR])) return {kNonFinite, T(0)};
  if (pap <= T(0)) return {kBreakdown, T(0)};
  return {kRunning, state[kRR] / pap};
}

// Writes a row's state after its step. `pap` is p.Ap and `rr` the new r.r (ignored unless the step was made).
template <typename T>
MLOPT_HD void cg_finish(T* state, T pap, T rr) {
  const bool was_running = state[kStatus] == T(kRunning);
  const CgDecision<T> decision = cg_decide(state, pap);
  if (was_running) state[kPAP] = pap;
  state[kStatus] = T(decision.status);
  if (decision.status != kRunning) return;
  state[kRR] = rr;
  state[kNumSteps] += T(1);
  if (rr <= state[kTolerance2]) state[kStatus] = T(kConverged);
  if (!is_finite(rr)) state[kStatus] = T(kNonFinite);
}

template <typename T>
MLOPT_HD void cg_residual_elem(T& r, T ap, T alpha) {  // r -= alpha Ap
  r -= alpha * ap;
}

template <typename T>
MLOPT_HD void cg_direction_elem(T& x, T& p, T r, T alpha, T beta) {  // x += alpha p;  p = r + beta p
  x += alpha * p;
  p = r + beta * p;
}

template <typename T>
MLOPT_HD void neumann_step_elem(T& v, T& acc, T av, T scale) {  // v -= scale Av;  acc += v
  v -= scale * av;
  acc += v;
}

template <typename T>
MLOPT_HD T perturb_elem(T x, T step, T direction) {
  return x + step * direction;
}

template <typename T>
void dot_cpu(const DotParams<T>& q, ParallelFor pool);
template <typename T>
void cg_step_cpu(const CgParams<T>& q, ParallelFor pool);
template <typename T>
void neumann_step_cpu(const NeumannParams<T>& q, ParallelFor pool);
template <typename T>
void perturb_cpu(const PerturbParams<T>& q, ParallelFor pool);

// Each returns nullptr, or the text of the CUDA error of its launch.
template <typename T>
const char* dot_cuda(const DotParams<T>& q, mlopt_stream stream);
template <typename T>
const char* cg_step_cuda(const CgParams<T>& q, mlopt_stream stream);
template <typename T>
const char* neumann_step_cuda(const NeumannParams<T>& q, mlopt_stream stream);
template <typename T>
const char* perturb_cuda(const PerturbParams<T>& q, mlopt_stream stream);

}  // namespace mlopt
