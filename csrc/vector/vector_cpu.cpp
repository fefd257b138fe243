// CPU kernels of the family `vector`: loops over fixed blocks around the element functions of vector.h.
//
// Bound: bytes. A CG step reads p, Ap (p.Ap), reads r, Ap and writes r, then reads x, r, p and writes x, p: 10 vector
// passes; the two reductions in between forbid fewer than three sweeps. (x waits for the last one, which reads p
// anyway.)
#include <algorithm>
#include <cmath>

#include "vector.h"

namespace mlopt {
namespace {

// Compiled once per instruction set; the loader picks one. The number of lanes is fixed and contraction into fused
// multiply-adds is off (see setup.py), so every instruction set gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MLOPT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MLOPT_CLONES
#endif

constexpr int kLanes = 32;  // independent partial sums per block: enough to hide the latency of vector adds

// Least blocks per thread: 64 Ki elements. Below that a thread costs more to wake than it saves.
constexpr int64_t kGrain = 16;

template <typename T>
T sum_lanes(const T* lanes) {
  T folded[kLanes];
  std::copy(lanes, lanes + kLanes, folded);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) folded[j] += folded[j + width];
  return folded[0];
}

#define MLOPT_DEFINE_LOOPS(T)                                                                             \
  MLOPT_CLONES T dot_block(const T* a, const T* b, int64_t n) {                                           \
    T lanes[kLanes] = {};                                                                                 \
    int64_t i = 0;                                                                                        \
    for (; i + kLanes <= n; i += kLanes)                                                                  \
      for (int j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];                                   \
    for (int j = 0; i < n; ++i, ++j) lanes[j] += a[i] * b[i];                                             \
    return sum_lanes(lanes);                                                                              \
  }                                                                                                       \
  MLOPT_CLONES T cg_residual_block(const CgParams<T>& q, int64_t begin, int64_t n, T alpha) {             \
    T lanes[kLanes] = {};                                                                                 \
    T* __restrict__ r = q.r + begin;                                                                      \
    const T* __restrict__ ap = q.ap + begin;                                                              \
    int64_t i = 0;                                                                                        \
    for (; i + kLanes <= n; i += kLanes)                                                                  \
      for (int j = 0; j < kLanes; ++j) {                                                                  \
        cg_residual_elem(r[i + j], ap[i + j], alpha);                                                     \
        lanes[j] += r[i + j] * r[i + j];                                                                  \
      }                                                                                                   \
    for (int j = 0; i < n; ++i, ++j) {                                                                    \
      cg_residual_elem(r[i], ap[i], alpha);                                                               \
      lanes[j] += r[i] * r[i];                                                                            \
    }                                                                                                     \
    return sum_lanes(lanes);                                                                              \
  }                                                                                                       \
  MLOPT_CLONES void cg_direction_block(const CgParams<T>& q, int64_t begin, int64_t n, T alpha, T beta) { \
    T* __restrict__ x = q.x + begin;                                                                      \
    const T* __restrict__ r = q.r + begin;                                                                \
    T* __restrict__ p = q.p + begin;                                                                      \
    for (int64_t i = 0; i < n; ++i) cg_direction_elem(x[i], p[i], r[i], alpha, beta);                     \
  }                                                                                                       \
  MLOPT_CLONES void neumann_block(const NeumannParams<T>& q, int64_t begin, int64_t end) {                \
    for (int64_t i = begin; i < end; ++i) neumann_step_elem(q.v[i], q.acc[i], q.av[i], q.scale);          \
  }                                                                                                       \
  MLOPT_CLONES void perturb_block(const PerturbParams<T>& q, int64_t begin, int64_t end, T step) {        \
    for (int64_t i = begin; i < end; ++i) q.out[i] = perturb_elem(q.x[i], step, q.direction[i]);          \
  }

MLOPT_DEFINE_LOOPS(float)
MLOPT_DEFINE_LOOPS(double)
#undef MLOPT_DEFINE_LOOPS

// Calls body(row, begin, end, block) for every block of every row; begin and end are offsets into [K * N].
template <typename Body>
void for_each_block(ParallelFor pool, int64_t rows, int64_t n, Body&& body) {
  const int64_t blocks = num_blocks(n);
  parallel_for(pool, rows * blocks, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t row = k / blocks, block = k % blocks;
      const int64_t begin = block * kBlock;
      body(row, row * n + begin, row * n + std::min(begin + kBlock, n), k);
    }
  });
}

// Sums a row's partials in block order, in double: the number of blocks grows with N, the rounding must not. The sum
// replaces the first partial.
template <typename T>
T fold_partials(T* partials, int64_t row, int64_t blocks) {
  double sum = 0;
  for (int64_t k = 0; k < blocks; ++k) sum += partials[row * blocks + k];
  return partials[row * blocks] = static_cast<T>(sum);
}

}  // namespace

template <typename T>
void dot_cpu(const DotParams<T>& q, ParallelFor pool) {
  const int64_t blocks = num_blocks(q.n);
  for_each_block(pool, q.rows, q.n, [&](int64_t, int64_t begin, int64_t end, int64_t k) {
    q.partials[k] = dot_block(q.a + begin, q.b + begin, end - begin);
  });
  for (int64_t row = 0; row < q.rows; ++row) {
    const T sum = fold_partials(q.partials, row, blocks);
    q.out[row] = q.take_sqrt ? std::sqrt(sum) : sum;
  }
}

template <typename T>
void cg_step_cpu(const CgParams<T>& q, ParallelFor pool) {
  const int64_t blocks = num_blocks(q.n);
  const auto state = [&](int64_t row) { return q.state + row * kNumColumns; };
  const auto runs = [&](int64_t row) { return state(row)[kStatus] == T(kRunning); };
  const auto decide = [&](int64_t row) { return cg_decide(state(row), q.pap_partials[row * blocks]); };

  for_each_block(pool, q.rows, q.n, [&](int64_t row, int64_t begin, int64_t end, int64_t k) {
    if (runs(row)) q.pap_partials[k] = dot_block(q.p + begin, q.ap + begin, end - begin);
  });
  for (int64_t row = 0; row < q.rows; ++row) {
    if (runs(row)) fold_partials(q.pap_partials, row, blocks);
  }
  for_each_block(pool, q.rows, q.n, [&](int64_t row, int64_t begin, int64_t end, int64_t k) {
    if (!runs(row)) return;
    const auto decision = decide(row);
    if (decision.status == kRunning) q.rr_partials[k] = cg_residual_block(q, begin, end - begin, decision.alpha);
  });
  for (int64_t row = 0; row < q.rows; ++row) {
    if (runs(row) && decide(row).status == kRunning) fold_partials(q.rr_partials, row, blocks);
  }
  for_each_block(pool, q.rows, q.n, [&](int64_t row, int64_t begin, int64_t end, int64_t) {
    if (!runs(row)) return;
    const auto decision = decide(row);
    if (decision.status != kRunning) return;
    cg_direction_block(q, begin, end - begin, decision.alpha, q.rr_partials[row * blocks] / state(row)[kRR]);
  });
  for (int64_t row = 0; row < q.rows; ++row) {
    if (runs(row)) cg_finish(state(row), q.pap_partials[row * blocks], q.rr_partials[row * blocks]);
  }
}

template <typename T>
void neumann_step_cpu(const NeumannParams<T>& q, ParallelFor pool) {
  for_each_block(pool, 1, q.numel, [&](int64_t, int64_t begin, int64_t end, int64_t) { neumann_block(q, begin, end); });
}

template <typename T>
void perturb_cpu(const PerturbParams<T>& q, ParallelFor pool) {
  for_each_block(pool, q.rows, q.n,
                 [&](int64_t row, int64_t begin, int64_t end, int64_t) { perturb_block(q, begin, end, q.step[row]); });
}

#define MLOPT_INSTANTIATE(T)                                               \
  template void dot_cpu<T>(const DotParams<T>&, ParallelFor);              \
  template void cg_step_cpu<T>(const CgParams<T>&, ParallelFor);           \
  template void neumann_step_cpu<T>(const NeumannParams<T>&, ParallelFor); \
  template void perturb_cpu<T>(const PerturbParams<T>&, ParallelFor);
MLOPT_INSTANTIATE(float)
MLOPT_INSTANTIATE(double)

}  // namespace mlopt
