// Family `glm`: losses that read their parameters through Z = X W. Torch-free.
//
// Every product of the family is one sweep over X: U = X V, a function of each row of U, X^T f(U). This header owns the
// row functions (shared by CPU and CUDA), the parameter structs and the prototypes of the kernels.
//
// Letters: T tasks, K right-hand sides, n rows (samples), D features, C classes. X is contiguous [T, n, D]. Parameters
// and everything shaped like them are *packed*: [T, K, C, S], one row of S = glm_stride(D, bias) elements per class:
// the D weights, the bias of that class (an implicit column of ones in X) if there is one, then zeros. Classes come
// before features so that the contiguous axis of X is also that of the parameters: vector lanes run over features and
// none is wasted, however few classes there are. A packed right-hand side is one plain vector to a solver.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"
#include "../common/parallel.h"
#include "../vector/vector.h"

namespace mlopt {

constexpr int64_t kGlmAlign = 16;       // elements that S is a multiple of: one 64-byte vector of float, two of double
constexpr int64_t kGlmMaxClasses = 32;  // above this a general matrix product does as well
constexpr int64_t kGlmRowBlock = 32;    // rows whose products are finished before the next: they stay in L2 in between
// What two such blocks may take of L2, of which CPUs have 1 MiB and more today.
constexpr int64_t kGlmPrefetchBytes = int64_t(1) << 19;

MLOPT_HD int64_t glm_stride(int64_t features, bool bias) {
  return (features + (bias ? 1 : 0) + kGlmAlign - 1) / kGlmAlign * kGlmAlign;
}

// Rows are summed in chunks, and the chunks in order, so the bits depend on the sizes and the kind of device alone.
// There are at most `most` chunks, each of at least `worth` multiply-adds per product, and their sums together take no
// more memory than half of X.
MLOPT_HD int64_t glm_chunk_rows(int64_t rows, int64_t features, int64_t columns, int64_t most, int64_t worth) {
  int64_t least = worth / (features * columns + 1);
  if (least < (rows + most - 1) / most) least = (rows + most - 1) / most;
  if (least < 2 * columns) least = 2 * columns;
  return (least / kGlmRowBlock + 1) * kGlmRowBlock;
}

inline int64_t glm_chunk_rows_cpu(int64_t rows, int64_t features, int64_t columns) {  // a chunk is worth a thread
  return glm_chunk_rows(rows, features, columns, 64, int64_t(1) << 18);
}

// Of one task, on the current device. wide: float64.
int64_t glm_chunk_rows_cuda(int64_t tasks, int64_t rows, int64_t features, int64_t classes, int64_t rhs, bool wide);

MLOPT_HD int64_t glm_num_chunks(int64_t rows, int64_t chunk_rows) {
  return rows <= chunk_rows ? 1 : (rows + chunk_rows - 1) / chunk_rows;
}

// What happens to a row u of U = X V between the two products.
enum GlmFunction : int {
  kGlmIdentity = 0,
  kGlmDiagonal = 1,      // u_c <- s d_c u_c
  kGlmSoftmax = 2,       // u_c <- s p_c (u_c - p.u), the curvature of a softmax with probabilities p
  kGlmLogistic = 3,      // u_c <- s (sigmoid(u_c) - t_c), the gradient of sum_c softplus(u_c) - t_c u_c
  kGlmSoftmaxIndex = 4,  // u_c <- s (softmax(u)_c - [c == label]), the gradient of the cross entropy
  kGlmSoftmaxDense = 5,  // the same for targets t: u_c <- s (softmax(u)_c sum(t) - t_c)
  kGlmRankOne = 6,       // u_c <- s (a_c u_c + b_c (g.u))
  kGlmBlock = 7,         // u_c <- s sum_k B_ck u_k
  // u_c <- q_c mean(u)_c - t_c, the gradient of a loss whose weights and targets are in q and t; mean is
  kGlmFitLinear = 8,    // u
  kGlmFitLogistic = 9,  // sigmoid(u)
  kGlmFitSoftmax = 10   // softmax(u)
};

// How the elements of X are stored.
enum GlmStorage : int {
  kGlmWide = 0,  // as T
  kGlmFloat16 = 1,
  kGlmBFloat16 = 2
};

template <typename T>
struct GlmRows {
  GlmFunction function;
  const T* values;        // d, p or t: [T, n, C] or, if per_row, [T, n]; (a, b, g): [T, n, 3, C]; B: [T, n, C, C]
  const T* weights;       // [T, n]: s, or nullptr for 1
  const int64_t* labels;  // [T, n]
  bool per_row;
  const T* scales;  // q: [T, n, C]; its t is `values`
};

// One sweep. `forward` computes U = X V (else U is read from z), `backward` computes out = X^T f(U) + diagonal * v.
template <typename T>
struct GlmProduct {
  const void* x;      // [T, n, D], stored as `storage` says: on CPU as T; on CUDA, for T = float, also as halves
  const T* v;         // packed [T, K, C, S]
  const T* diagonal;  // packed [T, C, S], or nullptr
  T* out;             // packed [T, K, C, S]
  T* z;               // [T, K, n, C] or nullptr: U without `backward`; the probabilities where f is a loss's gradient
  T* losses;          // [T], written where f is a loss's gradient
  T* partials;        // workspace [T, chunks, glm_partial_size]
  GlmRows<T> rows_function;
  int64_t tasks, rows, features, classes, rhs, chunk_rows;
  bool bias, forward, backward;
  GlmStorage storage;

  MLOPT_HD int64_t columns() const { return rhs * classes; }
  MLOPT_HD int64_t stride() const { return glm_stride(features, bias); }
  MLOPT_HD int64_t num_chunks() const { return glm_num_chunks(rows, chunk_rows); }
};

// Elements of workspace per chunk of rows: its sum of X^T f(U), one block of U, its sum of losses (as a double).
MLOPT_HD int64_t glm_partial_size(int64_t columns, int64_t stride) {
  return columns * (stride + kGlmRowBlock) + kGlmAlign;
}

// Conjugate gradients on (X^T f(X .) + diagonal) x = b from x, with residuals r, directions p == product.v and products
// product.out; all packed, one solve per right-hand side of each task.
template <typename T>
struct GlmCg {
  GlmProduct<T> product;
  T* x;             // [T, K, C, S]
  T* r;             // [T, K, C, S]
  T* p;             // [T, K, C, S]
  T* state;         // [T, K, kNumColumns]
  T* pap_partials;  // workspace [T, K, num_blocks(C * S)]
  T* rr_partials;   // workspace like it
  int64_t max_steps;
};

// acc = sum_{k < num_terms} (I - scale H)^k acc; term == product.v starts as a copy of acc and ends as the last term.
template <typename T>
struct GlmNeumann {
  GlmProduct<T> product;
  T* term;  // [T, K, C, S]
  T* acc;   // [T, K, C, S]
  T scale;
  int64_t num_terms;
};

// Descent by steps that are affine in what they change, element by element, with the gradient g == product.out:
//   w += a_0 + a_1 w + a_2 velocity + a_3 g,  velocity = b_0 + b_1 w + b_2 velocity + b_3 g
// and, without a velocity, w += a_0 + a_1 w + a_2 g. w == product.v, K == 1. The first is an increment because a_1 may
// be less than a rounding of 1 (a weight decay times a small step).
template <typename T>
struct GlmDescent {
  GlmProduct<T> product;
  T* w;                   // [T, C, S]
  T* velocity;            // [T, C, S] or nullptr
  const T* coefficients;  // a, then b: [1 or 2, 3 or 4, C, S], for all tasks
  T* losses;              // [num_steps, T]: before each step, with the regularizer w.(diagonal * w) / 2; or nullptr
  T* narrow;              // workspace of glm_narrow_size elements, or nullptr; see glm_narrow.h
  int64_t num_steps;

  MLOPT_HD int64_t size() const { return product.classes * product.stride(); }

  // The step of element `at` of the first task's, in a task's own w, velocity and gradient.
  MLOPT_HD void update(int64_t at, T* own_w, T* own_velocity, const T* gradient) const {
    const int64_t n = size();
    const T old = own_w[at], g = gradient[at], *a = coefficients + at;
    if (own_velocity == nullptr) {
      own_w[at] = old + (a[0] + a[n] * old + a[2 * n] * g);
      return;
    }
    const T v = own_velocity[at], *b = a + 4 * n;
    own_w[at] = old + (a[0] + a[n] * old + a[2 * n] * v + a[3 * n] * g);
    own_velocity[at] = b[0] + b[n] * old + b[2 * n] * v + b[3 * n] * g;
  }
};

// ---- row functions ----

// Who works on a row: one thread here. Where several do, each has the classes first, first + step, ... of it.
struct GlmAlone {
  static constexpr int first = 0, step = 1;

  template <typename T>
  MLOPT_HD T sum(T own) const {
    return own;
  }
  template <typename T>
  MLOPT_HD T largest(T own) const {
    return own;
  }
  MLOPT_HD void meet() const {}
};

template <typename T, typename Team>
MLOPT_HD T glm_logistic_row(const Team& team, const T* targets, int64_t classes, T weight, T* u, T* probabilities) {
  T loss = 0;
  for (int64_t c = team.first; c < classes; c += team.step) {
    const T z = u[c], e = std::exp(-std::fabs(z));  // never overflows
    const T p = (z >= T(0) ? T(1) : e) / (T(1) + e);
    loss += (z > T(0) ? z : T(0)) - targets[c] * z + std::log1p(e);
    if (probabilities != nullptr) probabilities[c] = p;
    u[c] = weight * (p - targets[c]);
  }
  return weight * loss;
}

// Cross entropy with targets t, or with a label where t is null. A label out of range makes NaN, never an access out of
// range.
template <typename T, typename Team>
MLOPT_HD T glm_softmax_row(const Team& team, const T* targets, int64_t label, int64_t classes, T weight, T* u,
                           T* probabilities) {
  T largest = u[0], total = 0, picked = 0, mass = 0;
  for (int64_t c = team.first; c < classes; c += team.step) largest = u[c] > largest ? u[c] : largest;
  largest = team.largest(largest);
  for (int64_t c = team.first; c < classes; c += team.step) {
    const T t = targets != nullptr ? targets[c] : T(c == label), z = u[c] - largest;
    mass += t;
    picked += t == T(0) ? T(0) : t * z;
    u[c] = std::exp(z);
    total += u[c];
  }
  total = team.sum(total);
  mass = team.sum(mass);
  const T valid = targets != nullptr || (label >= 0 && label < classes) ? T(1) : T(NAN);
  for (int64_t c = team.first; c < classes; c += team.step) {
    const T t = targets != nullptr ? targets[c] : T(c == label), p = u[c] / total;
    if (probabilities != nullptr) probabilities[c] = p;
    u[c] = weight * valid * (p * mass - t);
  }
  return weight * valid * ((team.first == 0 ? mass * std::log(total) : T(0)) - picked);
}

// q_c mean(u)_c - t_c.
template <typename T, typename Team>
MLOPT_HD void glm_fit_row(const Team& team, GlmFunction function, const T* scales, const T* targets, int64_t classes,
                          T* u) {
  T largest = u[0], total = 0;
  if (function == kGlmFitSoftmax) {
    for (int64_t c = team.first; c < classes; c += team.step) largest = u[c] > largest ? u[c] : largest;
    largest = team.largest(largest);
    for (int64_t c = team.first; c < classes; c += team.step) {
      u[c] = std::exp(u[c] - largest);
      total += u[c];
    }
    total = team.sum(total);
  }
  for (int64_t c = team.first; c < classes; c += team.step) {
    T mean = u[c];
    if (function == kGlmFitSoftmax) mean = u[c] / total;
    if (function == kGlmFitLogistic) {
      const T e = std::exp(-std::fabs(u[c]));  // never overflows
      mean = (u[c] >= T(0) ? T(1) : e) / (T(1) + e);
    }
    u[c] = scales[c] * mean - targets[c];
  }
}

// Applies f to the C elements of row `row` (of all tasks' rows) for one right-hand side; returns the row's loss, if f
// is a loss's gradient (of a team, the sum of what its threads return).
template <typename T, typename Team = GlmAlone>
MLOPT_HD T glm_row(const GlmRows<T>& q, int64_t row, int64_t classes, T* u, T* probabilities, const Team& team = {}) {
  const T weight = q.weights != nullptr ? q.weights[row] : T(1);
  switch (q.function) {
    case kGlmIdentity:
      return 0;
    case kGlmDiagonal:
      for (int64_t c = team.first; c < classes; c += team.step)
        u[c] *= weight * (q.per_row ? q.values[row] : q.values[row * classes + c]);
      return 0;
    case kGlmSoftmax: {
      const T* p = q.values + row * classes;
      T mean = 0;
      for (int64_t c = team.first; c < classes; c += team.step) mean += p[c] * u[c];
      mean = team.sum(mean);
      for (int64_t c = team.first; c < classes; c += team.step) u[c] = weight * p[c] * (u[c] - mean);
      return 0;
    }
    case kGlmRankOne: {
      const T *a = q.values + 3 * row * classes, *b = a + classes, *g = b + classes;
      T dot = 0;
      for (int64_t c = team.first; c < classes; c += team.step) dot += g[c] * u[c];
      dot = team.sum(dot);
      for (int64_t c = team.first; c < classes; c += team.step) u[c] = weight * (a[c] * u[c] + b[c] * dot);
      return 0;
    }
    case kGlmBlock: {
      const T* block = q.values + row * classes * classes;
      T sums[kGlmMaxClasses];
      for (int64_t c = team.first; c < classes; c += team.step) {
        T sum = 0;
        for (int64_t k = 0; k < classes; ++k) sum += block[c * classes + k] * u[k];
        sums[c] = sum;
      }
      team.meet();  // all have read u
      for (int64_t c = team.first; c < classes; c += team.step) u[c] = weight * sums[c];
      return 0;
    }
    case kGlmLogistic:
      return glm_logistic_row(team, q.values + row * classes, classes, weight, u, probabilities);
    case kGlmSoftmaxIndex:
      return glm_softmax_row<T>(team, nullptr, q.labels[row], classes, weight, u, probabilities);
    case kGlmSoftmaxDense:
      return glm_softmax_row<T>(team, q.values + row * classes, -1, classes, weight, u, probabilities);
    case kGlmFitLinear:
    case kGlmFitLogistic:
    case kGlmFitSoftmax:
      glm_fit_row(team, q.function, q.scales + row * classes, q.values + row * classes, classes, u);
      return 0;
  }
  return 0;
}

MLOPT_HD bool glm_is_loss(GlmFunction f) { return f >= kGlmLogistic && f <= kGlmSoftmaxDense; }

template <typename T>
void glm_product_cpu(const GlmProduct<T>& q, ParallelFor pool);
template <typename T>
void glm_cg_cpu(const GlmCg<T>& q, ParallelFor pool);
template <typename T>
void glm_neumann_cpu(const GlmNeumann<T>& q, ParallelFor pool);
template <typename T>
void glm_descent_cpu(const GlmDescent<T>& q, ParallelFor pool);

// Each returns nullptr, or the text of the CUDA error of its launches.
template <typename T>
const char* glm_product_cuda(const GlmProduct<T>& q, mlopt_stream stream);
template <typename T>
const char* glm_cg_cuda(const GlmCg<T>& q, mlopt_stream stream);
template <typename T>
const char* glm_neumann_cuda(const GlmNeumann<T>& q, mlopt_stream stream);
template <typename T>
const char* glm_descent_cuda(const GlmDescent<T>& q, mlopt_stream stream);

}  // namespace mlopt
