// CUDA kernels of the family `vector`.
//
// One grid row (blockIdx.y) per row of the tensors, and one block per part of it. A sum is made of one partial per
// part, and every consumer folds the partials again in one fixed order: no atomics, no synchronization with the host,
// the same bits on every repeat, and nothing that a CUDA graph could not capture. Accesses are of 16 bytes wherever the
// rows allow it. A step of conjugate gradients on short rows is one kernel, with a block for each row.
#include "../common/launch.cuh"
#include "vector.h"

namespace mlopt {

// 65535 rows is the limit of gridDim.y; rows beyond it are reached by the loop over `row`.
constexpr int64_t kMaxGridRows = 65535;
// Parts of a row: what 132 multiprocessors have room for at once, so that all parts are equal and run side by side, and
// so few that folding their sums in every block costs little. Other devices have fewer or more; the bits stay.
constexpr int64_t kMostParts = 792;
constexpr int64_t kUnit = 4 * kThreads;  // elements that the size of a part is a multiple of
constexpr int64_t kShortRow = 16384;     // a block needs about as long for a step on that as a launch takes
constexpr int kShortRowThreads = 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a row of n elements is cut; there are at most num_blocks(n) parts.
struct Parts {
  int64_t size, count;

  explicit Parts(int64_t n)
      : size(ceil_div(n, kMostParts) <= kBlock ? kBlock : ceil_div(ceil_div(n, kMostParts), kUnit) * kUnit),
        count(n == 0 ? 1 : ceil_div(n, size)) {}
};

namespace {

inline dim3 grid_for(int64_t blocks, int64_t rows) {
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows < kMaxGridRows ? rows : kMaxGridRows));
}

// For kernels with one block per row.
inline dim3 row_grid(int64_t rows) { return dim3(static_cast<unsigned>(rows < kMaxGridRows ? rows : kMaxGridRows)); }

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T of[kSize];
};

template <typename T>
__device__ Pack<T> load(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}

template <typename T>
__device__ void store(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

template <typename... Pointers>
bool aligned(int64_t rows, int64_t n, int64_t element, Pointers... pointers) {
  return (rows == 1 || n * element % 16 == 0) && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls `pack(i)` for the places [i, i + Pack::kSize) of the block's part of a row, and `one(i)` for what is left over.
// Backwards, what the kernel before has read or written last comes first: where a vector is larger than the L2 cache,
// that is still there.
template <typename T, bool kBackwards = false, typename OfPack, typename OfOne>
__device__ void for_part(int64_t row, int64_t n, const Parts& parts, bool by_16, OfPack pack, OfOne one) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t begin = row * n + blockIdx.x * parts.size;
  const int64_t end = blockIdx.x + 1 < parts.count ? begin + parts.size : (row + 1) * n;
  const int64_t whole = by_16 ? begin + (end - begin) / kSize * kSize : begin;
  const int64_t first = begin + threadIdx.x * kSize, step = kThreads * kSize;
  if constexpr (kBackwards) {
    for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) one(i);
    if (first >= whole) return;
    MLOPT_UNROLL_BY(2)
    for (int64_t i = first + (whole - 1 - first) / step * step; i >= first; i -= step) pack(i);
  } else {
    MLOPT_UNROLL_BY(2)
    for (int64_t i = first; i < whole; i += step) pack(i);
    for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) one(i);
  }
}

// Sum of a row's partials; every thread of the block gets it.
template <typename T>
__device__ T fold_partials(const T* partials, int64_t row, int64_t count) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) sum += partials[row * count + k];
  return static_cast<T>(block_sum(sum));
}

template <typename T>
__global__ void dot_partials_kernel(DotParams<T> q, Parts parts, bool by_16) {
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y) {
    T sum = 0;
    for_part<T>(
        row, q.n, parts, by_16,
        [&](int64_t i) {
          const Pack<T> a = load(q.a + i), b = load(q.b + i);
          for (int k = 0; k < Pack<T>::kSize; ++k) sum += a.of[k] * b.of[k];
        },
        [&](int64_t i) { sum += q.a[i] * q.b[i]; });
    sum = static_cast<T>(block_sum(double(sum)));
    if (threadIdx.x == 0) q.partials[row * parts.count + blockIdx.x] = sum;
  }
}

template <typename T>
__global__ void dot_finish_kernel(DotParams<T> q, Parts parts) {
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x) {
    const T sum = fold_partials(q.partials, row, parts.count);
    if (threadIdx.x == 0) q.out[row] = q.take_sqrt ? sqrt(sum) : sum;
  }
}

// r -= alpha Ap;  partials of r.r
template <typename T>
__global__ void cg_residual_kernel(CgParams<T> q, Parts parts, bool by_16) {
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y) {
    const T* state = q.state + row * kNumColumns;
    if (state[kStatus] != T(kRunning)) continue;
    const auto decision = cg_decide(state, fold_partials(q.pap_partials, row, parts.count));
    if (decision.status != kRunning) continue;
    T sum = 0;
    for_part<T, true>(
        row, q.n, parts, by_16,
        [&](int64_t i) {
          Pack<T> r = load(q.r + i);
          const Pack<T> ap = load(q.ap + i);
          for (int k = 0; k < Pack<T>::kSize; ++k) {
            cg_residual_elem(r.of[k], ap.of[k], decision.alpha);
            sum += r.of[k] * r.of[k];
          }
          store(q.r + i, r);
        },
        [&](int64_t i) {
          cg_residual_elem(q.r[i], q.ap[i], decision.alpha);
          sum += q.r[i] * q.r[i];
        });
    sum = static_cast<T>(block_sum(double(sum)));
    if (threadIdx.x == 0) q.rr_partials[row * parts.count + blockIdx.x] = sum;
  }
}

// x += alpha p;  p = r + beta p
template <typename T>
__global__ void cg_direction_kernel(CgParams<T> q, Parts parts, bool by_16) {
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y) {
    const T* state = q.state + row * kNumColumns;
    if (state[kStatus] != T(kRunning)) continue;
    const auto decision = cg_decide(state, fold_partials(q.pap_partials, row, parts.count));
    if (decision.status != kRunning) continue;
    const T beta = fold_partials(q.rr_partials, row, parts.count) / state[kRR];
    for_part<T>(
        row, q.n, parts, by_16,
        [&](int64_t i) {
          Pack<T> x = load(q.x + i), p = load(q.p + i);
          const Pack<T> r = load(q.r + i);
          for (int k = 0; k < Pack<T>::kSize; ++k) cg_direction_elem(x.of[k], p.of[k], r.of[k], decision.alpha, beta);
          store(q.x + i, x);
          store(q.p + i, p);
        },
        [&](int64_t i) { cg_direction_elem(q.x[i], q.p[i], q.r[i], decision.alpha, beta); });
  }
}

// A kernel of its own: the state is read by all blocks of the kernels before, so none of them may write it.
template <typename T>
__global__ void cg_finish_kernel(CgParams<T> q, Parts parts) {
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x) {
    T* state = q.state + row * kNumColumns;
    if (state[kStatus] != T(kRunning)) continue;
    const T pap = fold_partials(q.pap_partials, row, parts.count);
    // The partials of r.r are unwritten where no step was made; cg_finish ignores their sum then.
    const T rr = fold_partials(q.rr_partials, row, parts.count);
    if (threadIdx.x == 0) cg_finish(state, pap, rr);
    __syncthreads();
  }
}

// A whole step; one block per row.
template <typename T>
__global__ void cg_short_kernel(CgParams<T> q) {
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x) {
    T* state = q.state + row * kNumColumns;
    if (state[kStatus] != T(kRunning)) continue;
    const int64_t begin = row * q.n + threadIdx.x, end = (row + 1) * q.n;
    T sum = 0;
    MLOPT_UNROLL_BY(4)
    for (int64_t i = begin; i < end; i += kShortRowThreads) sum += q.p[i] * q.ap[i];
    const T pap = static_cast<T>(block_sum(double(sum)));
    const auto decision = cg_decide(state, pap);
    T rr = 0;
    if (decision.status == kRunning) {
      sum = 0;
      MLOPT_UNROLL_BY(4)
      for (int64_t i = begin; i < end; i += kShortRowThreads) {
        T r = q.r[i];
        cg_residual_elem(r, q.ap[i], decision.alpha);
        q.r[i] = r;
        sum += r * r;
      }
      rr = static_cast<T>(block_sum(double(sum)));
      const T beta = rr / state[kRR];
      MLOPT_UNROLL_BY(4)
      for (int64_t i = begin; i < end; i += kShortRowThreads) {
        T x = q.x[i], p = q.p[i];
        cg_direction_elem(x, p, q.r[i], decision.alpha, beta);
        q.x[i] = x;
        q.p[i] = p;
      }
    }
    __syncthreads();  // all have read the state
    if (threadIdx.x == 0) cg_finish(state, pap, rr);
  }
}

template <typename T>
__global__ void neumann_step_kernel(NeumannParams<T> q, Parts parts, bool by_16) {
  for_part<T>(
      0, q.numel, parts, by_16,
      [&](int64_t i) {
        Pack<T> v = load(q.v + i), acc = load(q.acc + i);
        const Pack<T> av = load(q.av + i);
        for (int k = 0; k < Pack<T>::kSize; ++k) neumann_step_elem(v.of[k], acc.of[k], av.of[k], q.scale);
        store(q.v + i, v);
        store(q.acc + i, acc);
      },
      [&](int64_t i) { neumann_step_elem(q.v[i], q.acc[i], q.av[i], q.scale); });
}

template <typename T>
__global__ void perturb_kernel(PerturbParams<T> q, Parts parts, bool by_16) {
  for (int64_t row = blockIdx.y; row < q.rows; row += gridDim.y) {
    const T step = q.step[row];
    for_part<T>(
        row, q.n, parts, by_16,
        [&](int64_t i) {
          const Pack<T> x = load(q.x + i), direction = load(q.direction + i);
          Pack<T> out;
          for (int k = 0; k < Pack<T>::kSize; ++k) out.of[k] = perturb_elem(x.of[k], step, direction.of[k]);
          store(q.out + i, out);
        },
        [&](int64_t i) { q.out[i] = perturb_elem(q.x[i], step, q.direction[i]); });
  }
}

}  // namespace

template <typename T>
const char* dot_cuda(const DotParams<T>& q, mlopt_stream stream) {
  if (q.rows == 0) return nullptr;
  const Parts parts(q.n);
  const bool by_16 = aligned(q.rows, q.n, sizeof(T), q.a, q.b);
  MLOPT_LAUNCH(dot_partials_kernel<T>, grid_for(parts.count, q.rows), dim3(kThreads), stream, q, parts, by_16);
  MLOPT_LAUNCH(dot_finish_kernel<T>, row_grid(q.rows), dim3(kThreads), stream, q, parts);
  return launch_error();
}

template <typename T>
const char* cg_step_cuda(const CgParams<T>& q, mlopt_stream stream) {
  if (q.rows == 0) return nullptr;
  if (q.n <= kShortRow) {
    MLOPT_LAUNCH(cg_short_kernel<T>, row_grid(q.rows), dim3(kShortRowThreads), stream, q);
    return launch_error();
  }
  const Parts parts(q.n);
  const dim3 grid = grid_for(parts.count, q.rows);
  const bool by_16 = aligned(q.rows, q.n, sizeof(T), q.x, q.r, q.p, q.ap);
  const DotParams<T> pap{q.p, q.ap, nullptr, q.pap_partials, q.rows, q.n, false};
  MLOPT_LAUNCH(dot_partials_kernel<T>, grid, dim3(kThreads), stream, pap, parts, by_16);
  MLOPT_LAUNCH(cg_residual_kernel<T>, grid, dim3(kThreads), stream, q, parts, by_16);
  MLOPT_LAUNCH(cg_direction_kernel<T>, grid, dim3(kThreads), stream, q, parts, by_16);
  MLOPT_LAUNCH(cg_finish_kernel<T>, row_grid(q.rows), dim3(kThreads), stream, q, parts);
  return launch_error();
}

template <typename T>
const char* neumann_step_cuda(const NeumannParams<T>& q, mlopt_stream stream) {
  if (q.numel == 0) return nullptr;
  const Parts parts(q.numel);
  const bool by_16 = aligned(1, q.numel, sizeof(T), q.v, q.acc, q.av);
  MLOPT_LAUNCH(neumann_step_kernel<T>, grid_for(parts.count, 1), dim3(kThreads), stream, q, parts, by_16);
  return launch_error();
}

template <typename T>
const char* perturb_cuda(const PerturbParams<T>& q, mlopt_stream stream) {
  if (q.rows == 0 || q.n == 0) return nullptr;
  const Parts parts(q.n);
  const bool by_16 = aligned(q.rows, q.n, sizeof(T), q.x, q.direction, q.out);
  MLOPT_LAUNCH(perturb_kernel<T>, grid_for(parts.count, q.rows), dim3(kThreads), stream, q, parts, by_16);
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
