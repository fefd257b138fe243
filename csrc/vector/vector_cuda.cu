// CUDA kernels of the family `vector`.
//
// One grid row (blockIdx.y) per row of the tensors. A sum is made of one partial per block of kBlock elements, as on
// the CPU, and every consumer folds the partials again in one fixed order: no atomics, no synchronization with the
// host, the same bits on every repeat, and nothing that a CUDA graph could not capture.
#include "../common/launch.cuh"
#include "vector.h"

namespace mlopt {
namespace {

// 65535 rows is the limit of gridDim.y; rows beyond it are reached by the loop over `row`.
constexpr int64_t kMaxGridRows = 65535;
// Blocks that fill the largest devices about twice. More would repeat work: in the CG kernels each folds all partials
// of its row, so one block per kBlock elements would read a number of partials that is quadratic in N.
constexpr int64_t kMaxGridBlocks = 2048;

// A grid of at most `blocks` by `rows`; every kernel loops over what the grid leaves.
inline dim3 grid_for(int64_t blocks, int64_t rows) {
  const int64_t y = rows < kMaxGridRows ? rows : kMaxGridRows;
  const int64_t most = kMaxGridBlocks > y ? kMaxGridBlocks / y : 1;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most), static_cast<unsigned>(y));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sum of a row's partials; every thread of the block gets it.
template <typename T>
__device__ T fold_partials(const T* partials, int64_t row, int64_t blocks) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < blocks; k += kThreads) sum += partials[row * blocks + k];
  return static_cast<T>(block_sum(sum));
}

template <typename T>
__global__ void dot_partials_kernel(DotParams<T> q) {
  const int64_t blocks = num_blocks(q.n);
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y)
    for (int64_t k = blockIdx.x; k < blocks; k += gridDim.x) {
      const int64_t end = row * q.n + (k + 1 < blocks ? (k + 1) * kBlock : q.n);
      T sum = 0;
      for (int64_t i = row * q.n + k * kBlock + threadIdx.x; i < end; i += kThreads) sum += q.a[i] * q.b[i];
      sum = block_sum(sum);
      if (threadIdx.x == 0) q.partials[row * blocks + k] = sum;
    }
}

template <typename T>
__global__ void dot_finish_kernel(DotParams<T> q) {
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x) {
    const T sum = fold_partials(q.partials, row, num_blocks(q.n));
    if (threadIdx.x == 0) q.out[row] = q.take_sqrt ? sqrt(sum) : sum;
  }
}

// r -= alpha Ap;  partials of r.r
template <typename T>
__global__ void cg_residual_kernel(CgParams<T> q) {
  const int64_t blocks = num_blocks(q.n);
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y) {
    const T* state = q.state + row * kNumColumns;
    if (state[kStatus] != T(kRunning)) continue;
    const auto decision = cg_decide(state, fold_partials(q.pap_partials, row, blocks));
    if (decision.status != kRunning) continue;
    for (int64_t k = blockIdx.x; k < blocks; k += gridDim.x) {
      const int64_t end = row * q.n + (k + 1 < blocks ? (k + 1) * kBlock : q.n);
      T sum = 0;
      for (int64_t i = row * q.n + k * kBlock + threadIdx.x; i < end; i += kThreads) {
        cg_residual_elem(q, i, decision.alpha);
        sum += q.r[i] * q.r[i];
      }
      sum = block_sum(sum);
      if (threadIdx.x == 0) q.rr_partials[row * blocks + k] = sum;
    }
  }
}

// x += alpha p;  p = r + beta p
template <typename T>
__global__ void cg_direction_kernel(CgParams<T> q) {
  const int64_t blocks = num_blocks(q.n);
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y) {
    const T* state = q.state + row * kNumColumns;
    if (state[kStatus] != T(kRunning)) continue;
    const auto decision = cg_decide(state, fold_partials(q.pap_partials, row, blocks));
    if (decision.status != kRunning) continue;
    const T beta = fold_partials(q.rr_partials, row, blocks) / state[kRR];
    for (int64_t k = blockIdx.x; k < blocks; k += gridDim.x) {
      const int64_t end = row * q.n + (k + 1 < blocks ? (k + 1) * kBlock : q.n);
      for (int64_t i = row * q.n + k * kBlock + threadIdx.x; i < end; i += kThreads)
        cg_direction_elem(q, i, decision.alpha, beta);
    }
  }
}

// A kernel of its own: the state is read by all blocks of the kernels before, so none of them may write it.
template <typename T>
__global__ void cg_finish_kernel(CgParams<T> q) {
  const int64_t blocks = num_blocks(q.n);
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x) {
    T* state = q.state + row * kNumColumns;
    if (state[kStatus] != T(kRunning)) continue;
    const T pap = fold_partials(q.pap_partials, row, blocks);
    // The partials of r.r are unwritten where no step was made; cg_finish ignores their sum then.
    const T rr = fold_partials(q.rr_partials, row, blocks);
    if (threadIdx.x == 0) cg_finish(state, pap, rr);
    __syncthreads();
  }
}

template <typename T>
__global__ void neumann_step_kernel(NeumannParams<T> q) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < q.numel; i += stride) neumann_step_elem(q, i);
}

template <typename T>
__global__ void perturb_kernel(PerturbParams<T> q) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y)
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < q.n; i += stride) {
      const int64_t at = row * q.n + i;
      q.out[at] = perturb_elem(q.x[at], q.step[row], q.direction[at]);
    }
}

}  // namespace

template <typename T>
const char* dot_cuda(const DotParams<T>& q, mlopt_stream stream) {
  if (q.rows == 0) return nullptr;
  MLOPT_LAUNCH(dot_partials_kernel<T>, grid_for(num_blocks(q.n), q.rows), dim3(kThreads), stream, q);
  MLOPT_LAUNCH(dot_finish_kernel<T>, grid_for(q.rows, 1), dim3(kThreads), stream, q);
  return launch_error();
}

template <typename T>
const char* cg_step_cuda(const CgParams<T>& q, mlopt_stream stream) {
  if (q.rows == 0) return nullptr;
  const dim3 grid = grid_for(num_blocks(q.n), q.rows);
  const DotParams<T> pap{q.p, q.ap, nullptr, q.pap_partials, q.rows, q.n, false};
  MLOPT_LAUNCH(dot_partials_kernel<T>, grid, dim3(kThreads), stream, pap);
  MLOPT_LAUNCH(cg_residual_kernel<T>, grid, dim3(kThreads), stream, q);
  MLOPT_LAUNCH(cg_direction_kernel<T>, grid, dim3(kThreads), stream, q);
  MLOPT_LAUNCH(cg_finish_kernel<T>, grid_for(q.rows, 1), dim3(kThreads), stream, q);
  return launch_error();
}

template <typename T>
const char* neumann_step_cuda(const NeumannParams<T>& q, mlopt_stream stream) {
  if (q.numel == 0) return nullptr;
  MLOPT_LAUNCH(neumann_step_kernel<T>, grid_for(ceil_div(q.numel, kThreads), 1), dim3(kThreads), stream, q);
  return launch_error();
}

template <typename T>
const char* perturb_cuda(const PerturbParams<T>& q, mlopt_stream stream) {
  if (q.rows == 0 || q.n == 0) return nullptr;
  MLOPT_LAUNCH(perturb_kernel<T>, grid_for(ceil_div(q.n, kThreads), q.rows), dim3(kThreads), stream, q);
  return launch_error();
}

#define MLOPT_INSTANTIATE(T)                                                        \
  template const char* dot_cuda<T>(const DotParams<T>&, mlopt_stream);              \
  template const char* cg_step_cuda<T>(const CgParams<T>&, mlopt_stream);           \
  template const char* neumann_step_cuda<T>(const NeumannParams<T>&, mlopt_stream); \
  template const char* perturb_cuda<T>(const PerturbParams<T>&, mlopt_stream);
MLOPT_INSTANTIATE(float)
MLOPT_INSTANTIATE(double)

}  // namespace mlopt
