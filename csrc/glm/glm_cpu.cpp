// CPU kernels of the family `glm`: sweeps over blocks of rows, and the loops around them.
//
// Bound of a product: X is read from memory once; 4 n D C floating-point operations.
#include <algorithm>

#include "glm.h"
#include "glm_narrow.h"
#include "glm_tiles.h"

namespace mlopt {
namespace {

template <typename T>
struct Sweep {
  const GlmProduct<T>& q;
  const GlmTiles<T>& tiles = glm_tiles<T>();
  const int64_t columns = q.columns(), stride = q.stride(), chunks = q.num_chunks();
  const int64_t partial_size = glm_partial_size(columns, stride);
  // From one block of rows to the next, for the last product that reads a block (see glm_tiles.h).
  const int64_t block = kGlmRowBlock * q.features;
  const int64_t ahead = 2 * block * static_cast<int64_t>(sizeof(T)) <= kGlmPrefetchBytes ? block : 0;

  T* partial(int64_t task, int64_t chunk) const { return q.partials + (task * chunks + chunk) * partial_size; }
  T* block_of(T* partial) const { return partial + columns * stride; }
  T* loss_of(T* partial) const { return block_of(partial) + columns * kGlmRowBlock; }

  // Where U of one row and right-hand side lies outside of the sweep.
  T* outside(int64_t task, int64_t k, int64_t row) const {
    return q.z + ((task * q.rhs + k) * q.rows + row) * q.classes;
  }

  // u: [count, columns], from X V or from z.
  void fill(int64_t task, const T* x, int64_t begin, int64_t count, T* u) const {
    const T* v = q.v + task * columns * stride;
    if (q.forward) {
      tiles.forward(x, count, q.features, v, columns, stride, u, q.backward ? 0 : ahead);
      if (!q.bias) return;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < columns; ++c) u[i * columns + c] += v[c * stride + q.features];
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < q.rhs; ++k)
        std::copy_n(outside(task, k, begin + i), q.classes, u + i * columns + k * q.classes);
  }

  double apply(int64_t task, int64_t begin, int64_t count, T* u) const {
    double loss = 0;
    const bool is_loss = glm_is_loss(q.rows_function.function);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < q.rhs; ++k) {
        T* probabilities = is_loss && q.z != nullptr ? outside(task, k, begin + i) : nullptr;
        loss += glm_row(q.rows_function, task * q.rows + begin + i, q.classes, u + i * columns + k * q.classes,
                        probabilities);
      }
    return loss;
  }

  void run_chunk(int64_t task, int64_t chunk) const {
    T* acc = partial(task, chunk);
    T* u = block_of(acc);
    double loss = 0;
    if (q.backward) std::fill_n(acc, columns * stride, T(0));
    const int64_t end = std::min(q.rows, (chunk + 1) * q.chunk_rows);
    for (int64_t begin = chunk * q.chunk_rows; begin < end; begin += kGlmRowBlock) {
      const int64_t count = std::min(kGlmRowBlock, end - begin);
      const T* x = static_cast<const T*>(q.x) + (task * q.rows + begin) * q.features;
      fill(task, x, begin, count, u);
      if (!q.backward) {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = 0; k < q.rhs; ++k)
            std::copy_n(u + i * columns + k * q.classes, q.classes, outside(task, k, begin + i));
        continue;
      }
      if (q.rows_function.function != kGlmIdentity) loss += apply(task, begin, count, u);
      tiles.backward(x, count, q.features, u, columns, stride, acc, ahead);
      if (!q.bias) continue;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < columns; ++c) acc[c * stride + q.features] += u[i * columns + c];
    }
    *loss_of(acc) = static_cast<T>(loss);
  }

  // Elements [begin, end) of a task's sum, over the chunks in order, plus diagonal * v.
  void reduce(int64_t task, int64_t begin, int64_t end) const {
    T* out = q.out + task * columns * stride;
    std::copy(partial(task, 0) + begin, partial(task, 0) + end, out + begin);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const T* part = partial(task, chunk);
      for (int64_t j = begin; j < end; ++j) out[j] += part[j];
    }
    if (q.diagonal == nullptr) return;
    const int64_t size = q.classes * stride;
    const T* v = q.v + task * columns * stride;
    const T* diagonal = q.diagonal + task * size;
    for (int64_t j = begin; j < end; ++j) out[j] += diagonal[j % size] * v[j];
  }

  void run_task(int64_t task, ParallelFor pool) const {
    parallel_for(pool, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) run_chunk(task, chunk);
    });
    if (!q.backward) return;
    parallel_for(pool, columns * stride, std::max<int64_t>(1, (int64_t(1) << 16) / chunks),
                 [&](int64_t begin, int64_t end) { reduce(task, begin, end); });
    if (!glm_is_loss(q.rows_function.function)) return;
    double loss = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) loss += *loss_of(partial(task, chunk));
    q.losses[task] = static_cast<T>(loss);
  }
};

// Runs body(task, pool) for every task: small tasks beside each other, each by one thread; large ones one after
// another, each by all threads. The bits are the same.
template <typename T, typename Body>
void for_each_task(const GlmProduct<T>& q, ParallelFor pool, Body&& body) {
  if (q.num_chunks() > 1) {
    for (int64_t task = 0; task < q.tasks; ++task) body(task, pool);
    return;
  }
  const int64_t work = q.rows * q.features * q.columns() + 1;
  parallel_for(pool, q.tasks, std::max<int64_t>(1, (int64_t(1) << 16) / work), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) body(task, serial_for);
  });
}

}  // namespace

template <typename T>
void glm_product_cpu(const GlmProduct<T>& q, ParallelFor pool) {
  const Sweep<T> sweep{q};
  for_each_task(q, pool, [&](int64_t task, ParallelFor inner) { sweep.run_task(task, inner); });
}

template <typename T>
void glm_cg_cpu(const GlmCg<T>& q, ParallelFor pool) {
  const Sweep<T> sweep{q.product};
  const int64_t rhs = q.product.rhs, n = q.product.classes * q.product.stride(), blocks = num_blocks(n);
  for_each_task(q.product, pool, [&](int64_t task, ParallelFor inner) {
    const int64_t row = task * rhs, at = row * n;
    T* state = q.state + row * kNumColumns;
    const CgParams<T> step{q.x + at,
                           q.r + at,
                           q.p + at,
                           q.product.out + at,
                           state,
                           q.pap_partials + row * blocks,
                           q.rr_partials + row * blocks,
                           rhs,
                           n};
    for (int64_t k = 0; k < q.max_steps; ++k) {
      bool runs = false;
      for (int64_t j = 0; j < rhs; ++j) runs |= state[j * kNumColumns + kStatus] == T(kRunning);
      if (!runs) return;
      sweep.run_task(task, inner);
      cg_step_cpu(step, inner);
    }
  });
}

template <typename T>
void glm_neumann_cpu(const GlmNeumann<T>& q, ParallelFor pool) {
  const Sweep<T> sweep{q.product};
  const int64_t size = q.product.columns() * q.product.stride();
  for_each_task(q.product, pool, [&](int64_t task, ParallelFor inner) {
    const int64_t at = task * size;
    for (int64_t k = 1; k < q.num_terms; ++k) {
      sweep.run_task(task, inner);
      neumann_step_cpu<T>({q.term + at, q.acc + at, q.product.out + at, q.scale, size}, inner);
    }
  });
}

template <typename T>
void glm_descent_cpu(const GlmDescent<T>& q, ParallelFor pool) {
  if (q.narrow != nullptr) return glm_narrow_descent_cpu(q, pool);
  const Sweep<T> sweep{q.product};
  const int64_t size = q.size();
  for_each_task(q.product, pool, [&](int64_t task, ParallelFor inner) {
    T* w = q.w + task * size;
    T* velocity = q.velocity == nullptr ? nullptr : q.velocity + task * size;
    const T* gradient = q.product.out + task * size;
    const T* diagonal = q.product.diagonal == nullptr ? nullptr : q.product.diagonal + task * size;
    for (int64_t k = 0; k < q.num_steps; ++k) {
      sweep.run_task(task, inner);
      if (q.losses != nullptr) {
        double penalty = 0;
        for (int64_t j = 0; diagonal != nullptr && j < size; ++j) penalty += double(diagonal[j]) * w[j] * w[j];
        q.losses[k * q.product.tasks + task] = static_cast<T>(q.product.losses[task] + penalty / 2);
      }
      for (int64_t j = 0; j < size; ++j) q.update(j, w, velocity, gradient);
    }
  });
}

#define MLOPT_INSTANTIATE(T)                                           \
  template void glm_product_cpu<T>(const GlmProduct<T>&, ParallelFor); \
  template void glm_cg_cpu<T>(const GlmCg<T>&, ParallelFor);           \
  template void glm_neumann_cpu<T>(const GlmNeumann<T>&, ParallelFor); \
  template void glm_descent_cpu<T>(const GlmDescent<T>&, ParallelFor);
MLOPT_INSTANTIATE(float)
MLOPT_INSTANTIATE(double)

}  // namespace mlopt
