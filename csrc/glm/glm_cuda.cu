// CUDA kernels of the family `glm`.
//
// The sweep here serves any dtype and size; most of float32 goes to tensor cores, see glm_tensor.cu. One block per
// chunk of rows (blockIdx.x) and task (blockIdx.y). A block takes its rows kGlmRowBlock at a time: warps compute U, one
// thread per row applies f, and all threads add X^T f(U) to the chunk's sum; the rows' second read comes from the
// caches. A second kernel adds the chunks in order. No atomics, no synchronization with the host, nothing that a CUDA
// graph could not capture.
#include <algorithm>
#include <type_traits>

#include "../common/half.h"
#include "../common/launch.cuh"
#include "glm_tensor.h"

namespace mlopt {
namespace {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kRowsPerWarp = kGlmRowBlock / kWarps;
constexpr int kGroup = 4;              // columns per warp and pass of the forward product
constexpr int kBackwardGroup = 8;      // columns per thread and pass of the backward product
constexpr int kColumns = 32;           // columns of U in shared memory: as many right-hand sides as fit, at least one
constexpr int64_t kMostTasks = 65535;  // of gridDim.y; tasks beyond are reached by loops

static_assert(kRowsPerWarp * kWarps == kGlmRowBlock);
static_assert(kColumns >= kGlmMaxClasses);

inline dim3 glm_grid(int64_t blocks, int64_t tasks) {
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tasks < kMostTasks ? tasks : kMostTasks));
}

// A block's view of its chunk and of the right-hand sides [first_rhs, first_rhs + num_rhs) of its task. X is stored as
// Stored: what is bound by the bytes of X takes half the time where those are halves.
template <typename T, typename Stored>
struct Chunk {
  const GlmProduct<T>& q;
  int64_t task, begin, count;  // rows of the current row block, within the task
  int64_t first_rhs, num_rhs;
  T* acc;  // the chunk's sum, for all columns

  __device__ int64_t width() const { return num_rhs * q.classes; }
  __device__ const Stored* x(int64_t row) const {
    return static_cast<const Stored*>(q.x) + (task * q.rows + begin + row) * q.features;
  }
  __device__ const T* v() const { return q.v + (task * q.rhs + first_rhs) * q.classes * q.stride(); }
  __device__ T* outside(int64_t row, int64_t rhs) const {  // U of one row outside of the sweep
    return q.z + ((task * q.rhs + first_rhs + rhs) * q.rows + begin + row) * q.classes;
  }
};

// u = X V. Every warp has kRowsPerWarp rows; its lanes run over features. Rows and columns past the end are computed
// from the last one and not written, so that all lanes meet at every shuffle.
template <typename T, typename Stored>
__device__ void forward_block(const Chunk<T, Stored>& chunk, T* u) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t stride = chunk.q.stride(), features = chunk.q.features, width = chunk.width();
  const Stored* rows[kRowsPerWarp];
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int64_t row = warp * kRowsPerWarp + i;
    rows[i] = chunk.x(row < chunk.count ? row : chunk.count - 1);
  }
  for (int64_t first = 0; first < width; first += kGroup) {
    const T* columns[kGroup];
    for (int c = 0; c < kGroup; ++c) columns[c] = chunk.v() + (first + c < width ? first + c : width - 1) * stride;
    T sums[kRowsPerWarp][kGroup] = {};
    for (int64_t d = lane; d < features; d += kWarp) {
      T x[kRowsPerWarp];
      for (int i = 0; i < kRowsPerWarp; ++i) x[i] = widened(rows[i][d]);
      for (int c = 0; c < kGroup; ++c) {
        const T v = columns[c][d];
        for (int i = 0; i < kRowsPerWarp; ++i) sums[i][c] += x[i] * v;
      }
    }
    for (int i = 0; i < kRowsPerWarp; ++i)
      for (int c = 0; c < kGroup; ++c) {
        T sum = sums[i][c];
        for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0 && first + c < width)
          u[(warp * kRowsPerWarp + i) * kColumns + first + c] = sum + (chunk.q.bias ? columns[c][features] : T(0));
      }
  }
}

// acc += X^T u. A thread owns features, for all rows of the block: no two threads add to one element.
template <typename T, typename Stored>
__device__ void backward_block(const Chunk<T, Stored>& chunk, const T* u) {
  const int64_t stride = chunk.q.stride(), features = chunk.q.features, width = chunk.width();
  T* acc = chunk.acc + chunk.first_rhs * chunk.q.classes * stride;
  for (int64_t d = threadIdx.x; d < features; d += kThreads)
    for (int64_t first = 0; first < width; first += kBackwardGroup) {
      T sums[kBackwardGroup] = {};
      for (int64_t i = 0; i < chunk.count; ++i) {
        const T x = widened(chunk.x(i)[d]);
        for (int c = 0; c < kBackwardGroup; ++c) sums[c] += x * u[i * kColumns + first + c];
      }
      for (int c = 0; c < kBackwardGroup; ++c)
        if (first + c < width) acc[(first + c) * stride + d] += sums[c];
    }
  if (!chunk.q.bias) return;
  for (int64_t c = threadIdx.x; c < width; c += kThreads) {
    T sum = 0;
    for (int64_t i = 0; i < chunk.count; ++i) sum += u[i * kColumns + c];
    acc[c * stride + features] += sum;
  }
}

template <typename T, typename Stored>
__global__ void glm_sweep_kernel(GlmProduct<T> q) {
  __shared__ T u[kGlmRowBlock * kColumns];
  const int64_t columns = q.columns(), chunks = q.num_chunks();
  const int64_t per_pass = kColumns / q.classes;  // right-hand sides
  const bool is_loss = glm_is_loss(q.rows_function.function);
  for (int64_t k = threadIdx.x; k < kGlmRowBlock * kColumns; k += kThreads) u[k] = 0;  // columns past the end stay 0
  for (int64_t task = blockIdx.y; task < q.tasks; task += gridDim.y) {
    T* acc = q.partials + (task * chunks + blockIdx.x) * glm_partial_size(columns, q.stride());
    if (q.backward)
      for (int64_t k = threadIdx.x; k < columns * q.stride(); k += kThreads) acc[k] = 0;
    __syncthreads();
    const int64_t first_row = blockIdx.x * q.chunk_rows;
    const int64_t end = first_row + q.chunk_rows < q.rows ? first_row + q.chunk_rows : q.rows;
    double loss = 0;
    for (int64_t begin = first_row; begin < end; begin += kGlmRowBlock)
      for (int64_t rhs = 0; rhs < q.rhs; rhs += per_pass) {
        const int64_t count = end - begin < kGlmRowBlock ? end - begin : kGlmRowBlock;
        const Chunk<T, Stored> chunk{q, task, begin, count, rhs, q.rhs - rhs < per_pass ? q.rhs - rhs : per_pass, acc};
        if (q.forward) forward_block(chunk, u);
        __syncthreads();
        for (int64_t k = threadIdx.x; k < count * chunk.num_rhs; k += kThreads) {
          const int64_t row = k / chunk.num_rhs, j = k % chunk.num_rhs;
          T* mine = u + row * kColumns + j * q.classes;
          T* other = q.z == nullptr ? nullptr : chunk.outside(row, j);
          if (!q.forward)
            for (int64_t c = 0; c < q.classes; ++c) mine[c] = other[c];
          loss += glm_row(q.rows_function, task * q.rows + begin + row, q.classes, mine, is_loss ? other : nullptr);
          if (!q.backward)
            for (int64_t c = 0; c < q.classes; ++c) other[c] = mine[c];
        }
        __syncthreads();
        if (q.backward) backward_block(chunk, u);
        __syncthreads();  // the next rows overwrite u
      }
    if (is_loss) {
      loss = block_sum(loss);
      if (threadIdx.x == 0) acc[columns * (q.stride() + kGlmRowBlock)] = static_cast<T>(loss);
    }
  }
}

// A block's threads are kLanes rows of kStrip: a row has neighbouring elements, and the lanes share their chunks.
constexpr int kStrip = 32, kLanes = kThreads / kStrip;

// The chunks' sum of one element, in a fixed order; the threads of the first strip get it. All threads must call it.
template <typename T>
__device__ T sum_of_chunks(const T* partials, int64_t partial_size, int64_t chunks, bool exists) {
  __shared__ T lanes[kThreads];
  T sum = 0;
  if (exists)
    for (int64_t chunk = threadIdx.x / kStrip; chunk < chunks; chunk += kLanes) sum += partials[chunk * partial_size];
  lanes[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kStrip)
    for (int lane = 1; lane < kLanes; ++lane) sum += lanes[lane * kStrip + threadIdx.x];
  __syncthreads();  // the next call writes `lanes`
  return sum;
}

// out = the chunks' sums + diagonal * v; losses likewise. Then what `after(k)` does for element k of the task.
template <typename T, typename After>
__device__ void reduce_chunks(const GlmProduct<T>& q, After after) {
  const int64_t size = q.columns() * q.stride(), own = q.classes * q.stride(), chunks = q.num_chunks();
  const int64_t partial_size = glm_partial_size(q.columns(), q.stride());
  for (int64_t task = blockIdx.y; task < q.tasks; task += gridDim.y) {
    const T* partials = q.partials + task * chunks * partial_size;
    for (int64_t first = int64_t(blockIdx.x) * kStrip; first < size; first += int64_t(gridDim.x) * kStrip) {
      const int64_t k = first + threadIdx.x % kStrip;
      T sum = sum_of_chunks(partials + k, partial_size, chunks, k < size);
      if (threadIdx.x >= kStrip || k >= size) continue;
      if (q.diagonal != nullptr) sum += q.diagonal[task * own + k % own] * q.v[task * size + k];
      q.out[task * size + k] = sum;
      after(task, k);
    }
    if (blockIdx.x == 0 && glm_is_loss(q.rows_function.function)) {  // for all threads
      double loss = 0;
      for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads)
        loss += partials[chunk * partial_size + q.columns() * (q.stride() + kGlmRowBlock)];
      loss = block_sum(loss);
      if (threadIdx.x == 0) q.losses[task] = static_cast<T>(loss);
    }
  }
}

template <typename T>
__global__ void glm_reduce_kernel(GlmProduct<T> q) {
  reduce_chunks(q, [](int64_t, int64_t) {});
}

// The gradient, and the step along it.
template <typename T>
__global__ void glm_descent_kernel(GlmDescent<T> q) {
  const int64_t size = q.size();
  reduce_chunks(q.product, [&](int64_t task, int64_t k) {
    T* velocity = q.velocity == nullptr ? nullptr : q.velocity + task * size;
    q.update(k, q.w + task * size, velocity, q.product.out + task * size);
  });
}

// The losses at w before a step. One block per task, which has the sum of the regularizer to itself.
template <typename T>
__global__ void glm_losses_kernel(GlmDescent<T> q, int64_t step) {
  const int64_t size = q.size(), chunks = q.product.num_chunks();
  const int64_t partial_size = glm_partial_size(q.product.columns(), q.product.stride());
  for (int64_t task = blockIdx.x; task < q.product.tasks; task += gridDim.x) {
    double loss = 0;
    if (q.product.diagonal != nullptr)
      for (int64_t k = threadIdx.x; k < size; k += kThreads) {
        const double w = q.w[task * size + k];
        loss += double(q.product.diagonal[task * size + k]) * w * w / 2;
      }
    const T* partials = q.product.partials + task * chunks * partial_size;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads)
      loss += partials[chunk * partial_size + q.product.columns() * (q.product.stride() + kGlmRowBlock)];
    loss = block_sum(loss);
    if (threadIdx.x == 0) q.losses[step * q.product.tasks + task] = static_cast<T>(loss);
  }
}

template <typename T, typename Stored>
void launch_sweep(const GlmProduct<T>& q, mlopt_stream stream) {
  MLOPT_LAUNCH((glm_sweep_kernel<T, Stored>), glm_grid(q.num_chunks(), q.tasks), dim3(kThreads), stream, q);
}

template <typename T>
void launch_sweep_of(const GlmProduct<T>& q, mlopt_stream stream) {
  bool launched = false;
  if constexpr (std::is_same_v<T, float>) {
    launched = glm_sweep_tensor(q, stream);
    if (!launched && q.storage == kGlmFloat16) launch_sweep<T, Float16>(q, stream);
    if (!launched && q.storage == kGlmBFloat16) launch_sweep<T, BFloat16>(q, stream);
  }
  if (!launched && q.storage == kGlmWide) launch_sweep<T, T>(q, stream);
}

template <typename T>
dim3 reduce_grid(const GlmProduct<T>& q) {  // without features there are losses still, which the first block sums
  return glm_grid(std::max<int64_t>(1, (q.columns() * q.stride() + kStrip - 1) / kStrip), q.tasks);
}

template <typename T>
void launch_product(const GlmProduct<T>& q, mlopt_stream stream) {
  launch_sweep_of(q, stream);
  if (q.backward) MLOPT_LAUNCH(glm_reduce_kernel<T>, reduce_grid(q), dim3(kThreads), stream, q);
}

template <typename T>
bool is_empty(const GlmProduct<T>& q) {
  return q.tasks == 0 || q.rhs == 0;
}

}  // namespace

template <typename T>
const char* glm_product_cuda(const GlmProduct<T>& q, mlopt_stream stream) {
  if (is_empty(q)) return nullptr;
  launch_product(q, stream);
  return launch_error();
}

template <typename T>
const char* glm_cg_cuda(const GlmCg<T>& q, mlopt_stream stream) {
  if (is_empty(q.product)) return nullptr;
  const int64_t rows = q.product.tasks * q.product.rhs, n = q.product.classes * q.product.stride();
  const CgParams<T> step{q.x, q.r, q.p, q.product.out, q.state, q.pap_partials, q.rr_partials, rows, n};
  for (int64_t k = 0; k < q.max_steps; ++k) {  // steps after the last row has stopped change nothing
    launch_product(q.product, stream);
    if (const char* error = cg_step_cuda(step, stream)) return error;
  }
  return nullptr;
}

template <typename T>
const char* glm_neumann_cuda(const GlmNeumann<T>& q, mlopt_stream stream) {
  if (is_empty(q.product)) return nullptr;
  const int64_t numel = q.product.tasks * q.product.columns() * q.product.stride();
  for (int64_t k = 1; k < q.num_terms; ++k) {
    launch_product(q.product, stream);
    if (const char* error = neumann_step_cuda<T>({q.term, q.acc, q.product.out, q.scale, numel}, stream)) return error;
  }
  return nullptr;
}

template <typename T>
const char* glm_descent_cuda(const GlmDescent<T>& q, mlopt_stream stream) {
  if (is_empty(q.product)) return nullptr;
  const dim3 grid(static_cast<unsigned>(q.product.tasks < kMostTasks ? q.product.tasks : kMostTasks));
  for (int64_t k = 0; k < q.num_steps; ++k) {
    launch_sweep_of(q.product, stream);
    if (q.losses != nullptr) MLOPT_LAUNCH(glm_losses_kernel<T>, grid, dim3(kThreads), stream, q, k);
    MLOPT_LAUNCH(glm_descent_kernel<T>, reduce_grid(q.product), dim3(kThreads), stream, q);
  }
  return launch_error();
}

#define MLOPT_INSTANTIATE(T)                                                    \
  template const char* glm_product_cuda<T>(const GlmProduct<T>&, mlopt_stream); \
  template const char* glm_cg_cuda<T>(const GlmCg<T>&, mlopt_stream);           \
  template const char* glm_neumann_cuda<T>(const GlmNeumann<T>&, mlopt_stream); \
  template const char* glm_descent_cuda<T>(const GlmDescent<T>&, mlopt_stream);
MLOPT_INSTANTIATE(float)
MLOPT_INSTANTIATE(double)
#undef MLOPT_INSTANTIATE

}  // namespace mlopt
