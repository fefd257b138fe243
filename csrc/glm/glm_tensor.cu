// The sweep of the family `glm` on tensor cores: float32 products, X read once from device memory.
//
// Both products are taken with the classes as the rows of the unit's tiles, U^T = V^T X^T and out^T = f(U)^T X: V and
// the sum of a block stay in registers, spread over the warps by features, for all rows of the block's chunk. Tiles of
// kTileRows rows of X stream through shared memory, several on their way at any time, and serve both products there.
// Each float is split into two numbers the unit reads exactly, see tensor_core.cuh.
//
// Per tile: most of the warps, the product warps, multiply forward; then the row warps sum their parts and apply f,
// while the product warps multiply the tile before backward. One barrier of the block after each of the two.
#include <algorithm>

#include "../common/half.h"
#include "../common/tensor_core.cuh"
#include "glm_tensor.h"
#include "glm_tensor_tiles.cuh"

namespace mlopt {
namespace tensor_sweep {
namespace {

// Two neighbouring elements of a tile, and one.
__device__ float2 pair_of(const float* at) { return *reinterpret_cast<const float2*>(at); }
template <typename Half>
__device__ float2 pair_of(const Half* at) {
  const uint32_t both = *reinterpret_cast<const uint32_t*>(at);
  return {widened(Half{static_cast<uint16_t>(both)}), widened(Half{static_cast<uint16_t>(both >> 16)})};
}

// d += a b, to about the rounding of floats. A half is whole: it has no small part, and is not rounded (the NaN that
// halves become has all bits set, and would be rounded to zero).
template <bool kWhole>
__device__ void multiply(float (&d)[4], float (&small)[4], const uint32_t (&large_a)[4], const uint32_t (&small_a)[4],
                         float b0, float b1) {
  const Split first = kWhole ? Split{bits_of_float(b0), 0} : split(b0);
  const Split second = kWhole ? Split{bits_of_float(b1), 0} : split(b1);
  const uint32_t large_b[2] = {first.large, second.large}, small_b[2] = {first.small, second.small};
  mma_tf32(small, small_a, large_b);
  if constexpr (!kWhole) mma_tf32(small, large_a, small_b);
  mma_tf32(d, large_a, large_b);
}

// A product warp's share of both products: every kProductWarps-th step of kDepth features. Steps past the last feature
// multiply zeros by the first features: without branches, more products are on their way at a time.
template <typename Stored, typename S>
struct Share {
  static constexpr bool kWhole = sizeof(Stored) == 2;
  float v[S::kSteps][4];    // V^T as the left operand of the forward product
  float sum[S::kSteps][4];  // f(U)^T X
  int group, in_group, warp, features;

  __device__ Share(int lane, int warp_, int64_t features_)
      : group(lane / 4), in_group(lane % 4), warp(warp_), features(static_cast<int>(features_)) {}

  __device__ int feature(int step) const { return (step * S::kProductWarps + warp) * kDepth; }
  __device__ int existing(int step) const {
    return step < S::kSureSteps || feature(step) < features ? feature(step) : 0;
  }

  // Of V, packed: a pair of elements is aligned, and the one after the last feature exists.
  __device__ void load(const GlmProduct<float>& q, const Chunk& chunk) {
    const int64_t stride = q.stride();
    const float* from = q.v + (chunk.task * q.rhs + chunk.first_rhs) * q.classes * stride + feature(0) + 2 * in_group;
    MLOPT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = group + half * 8;
      const bool exists = q.forward && column < chunk.columns;
      const float* own = from + column * stride;
      MLOPT_UNROLL
      for (int j = 0; j < S::kSteps; ++j) {
        // The sum over features may go in any order: their pairs 2t, 2t + 1 are what the unit has as t, t + 4.
        const int d = feature(j) + 2 * in_group;
        float2 pair = {0.0f, 0.0f};
        if (exists && d < features) pair = *reinterpret_cast<const float2*>(own + (feature(j) - feature(0)));
        v[j][half] = pair.x;
        v[j][half + 2] = d + 1 < features ? pair.y : 0.0f;
        sum[j][half] = sum[j][half + 2] = 0.0f;
      }
    }
  }

  // Writes this warp's part of U^T for a tile, [columns, kTileRows].
  __device__ void forward(const unsigned char* tile, int pitch, int columns, float* part) const {
    float large[S::kUnits][4] = {}, small[S::kUnits][4] = {};
    const unsigned char* row = tile + group * pitch + 2 * in_group * sizeof(Stored);
    MLOPT_UNROLL
    for (int j = 0; j < S::kSteps; ++j) {
      uint32_t large_v[4], small_v[4];
      for (int i = 0; i < 4; ++i) {
        const Split parts = split(v[j][i]);
        large_v[i] = parts.large;
        small_v[i] = parts.small;
      }
      MLOPT_UNROLL
      for (int unit = 0; unit < S::kUnits; ++unit) {
        const float2 x = pair_of(reinterpret_cast<const Stored*>(row + unit * kUnitRows * pitch) + existing(j));
        multiply<kWhole>(large[unit], small[unit], large_v, small_v, x.x, x.y);
      }
    }
    MLOPT_UNROLL
    for (int unit = 0; unit < S::kUnits; ++unit) {
      float* to = part + group * S::kPartPitch + unit * kUnitRows + 2 * in_group;
      if (group < columns)
        *reinterpret_cast<float2*>(to) = {large[unit][0] + small[unit][0], large[unit][1] + small[unit][1]};
      if (group + 8 < columns)
        *reinterpret_cast<float2*>(to + 8 * S::kPartPitch) = {large[unit][2] + small[unit][2],
                                                              large[unit][3] + small[unit][3]};
    }
  }

  // sum += f(U)^T X for a tile; `finished` is f(U)^T.
  __device__ void backward(const unsigned char* tile, int pitch, const float* finished) {
    MLOPT_UNROLL
    for (int unit = 0; unit < S::kUnits; ++unit) {
      uint32_t large_u[4], small_u[4];
      const float* from = finished + unit * kUnitRows + in_group;
      for (int i = 0; i < 4; ++i) {
        const Split parts = split(from[(group + i % 2 * 8) * S::kFinishedPitch + i / 2 * 4]);
        large_u[i] = parts.large;
        small_u[i] = parts.small;
      }
      const auto* upper = reinterpret_cast<const Stored*>(tile + (unit * kUnitRows + in_group) * pitch) + group;
      const auto* lower = reinterpret_cast<const Stored*>(tile + (unit * kUnitRows + in_group + 4) * pitch) + group;
      MLOPT_UNROLL
      for (int j = 0; j < S::kSteps; ++j)
        multiply<kWhole>(sum[j], sum[j], large_u, small_u, widened(upper[existing(j)]), widened(lower[existing(j)]));
    }
  }

  __device__ void store(const GlmProduct<float>& q, const Chunk& chunk, float* partial) const {
    const int64_t stride = q.stride();
    MLOPT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = group + half * 8;
      float* own = partial + column * stride + feature(0) + 2 * in_group;
      MLOPT_UNROLL
      for (int j = 0; j < S::kSteps; ++j) {
        const int d = feature(j) + 2 * in_group;
        if (column >= chunk.columns || d >= features) continue;
        float* to = own + (feature(j) - feature(0));
        if (d + 1 < features)
          *reinterpret_cast<float2*>(to) = {sum[j][2 * half], sum[j][2 * half + 1]};
        else
          *to = sum[j][2 * half];
      }
    }
  }
};

// The lanes that work on a row together.
template <int kSize>
struct RowTeam {
  static constexpr int step = kSize;
  int first;

  template <typename T>
  __device__ T sum(T own) const {
    for (int k = step / 2; k > 0; k /= 2) own += __shfl_xor_sync(0xffffffffu, own, k);
    return own;
  }
  template <typename T>
  __device__ T largest(T own) const {
    for (int k = step / 2; k > 0; k /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, own, k);
      own = other > own ? other : own;
    }
    return own;
  }
  __device__ void meet() const { __syncwarp(); }
};

// The work of a row warp: U from its parts, then f, for its rows of the tiles of a chunk.
template <typename S>
struct RowsOfTile {
  const GlmProduct<float>& q;
  const Layout& at;
  const Chunk& chunk;
  unsigned char* shared;
  int lane, own;  // own: the first row of a tile
  double loss = 0;
  float bias = 0;  // of the lane's column: the sum over rows

  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }

  // The arguments of f where they were copied to, for rows that are counted from the first place there.
  __device__ GlmRows<float> arguments(int64_t first, int place) const {
    GlmRows<float> f = q.rows_function;
    if (f.values != nullptr)
      f.values = at.values_per_row > 0 ? floats(at.values) : f.values + (first - place) * q.classes * q.classes;
    if (f.scales != nullptr) f.scales = floats(at.scales);
    if (f.weights != nullptr) f.weights = floats(at.weights);
    if (f.labels != nullptr) f.labels = reinterpret_cast<const int64_t*>(shared + at.labels);
    return f;
  }

  __device__ void run(int tile, int stage) {
    const int width = static_cast<int>(q.classes), start = tile * S::kTileRows + own;
    const int rows = chunk.rows_from(start, S::kRowsPerWarp), place = stage * S::kTileRows + own;
    const float* parts = floats(at.parts) + own;
    const float* given = floats(at.values) + place * width;
    float* finished = floats(at.finished) + tile % 2 * kMost * S::kFinishedPitch + own;
    const GlmRows<float> f = arguments(chunk.task * q.rows + chunk.begin + start, place);
    const bool is_loss = glm_is_loss(f.function);
    const RowTeam<S::kTeam> team{lane % S::kTeam};
    const int row = lane / S::kTeam;
    const bool exists = row < rows;
    for (int rhs = 0; rhs < chunk.num_rhs; ++rhs) {
      const int first = rhs * width;
      float* u = floats(at.scratch) + (own + row) * kScratchPitch + first;
      for (int c = team.first; c < width; c += team.step)
        u[c] = q.forward ? product(parts, row, first + c) : given[row * width + c];
      __syncwarp();
      if (q.forward && rows > 0) {  // for all lanes, as teams need it; rows past the end do what the first does
        float* other = nullptr;
        if (exists && q.z != nullptr)
          other = q.z + ((chunk.task * q.rhs + chunk.first_rhs + rhs) * q.rows + chunk.begin + start + row) * q.classes;
        const float part = glm_row(f, place + (exists ? row : 0), width, u, is_loss ? other : nullptr, team);
        if (exists) loss += part;
        if (exists && !q.backward)
          for (int c = team.first; c < width; c += team.step) other[c] = u[c];
      }
      if (q.backward)
        for (int c = team.first; c < width; c += team.step)
          finished[(first + c) * S::kFinishedPitch + row] = exists ? u[c] : 0.0f;
    }
    if (!q.bias || !q.backward) return;
    __syncwarp();
    if (lane < chunk.columns)
      for (int row = 0; row < S::kRowsPerWarp; ++row) bias += finished[lane * S::kFinishedPitch + row];
  }

  // An element of U: the sum of its parts.
  __device__ float product(const float* parts, int row, int column) const {
    float sum = 0.0f;
    if (q.bias) sum = q.v[((chunk.task * q.rhs + chunk.first_rhs) * q.classes + column) * q.stride() + q.features];
    MLOPT_UNROLL
    for (int w = 0; w < S::kProductWarps; ++w) sum += parts[w * at.part_size + column * S::kPartPitch + row];
    return sum;
  }

  // Bias and loss of all row warps, where the parts of U were: a row of kMost + 2 elements each.
  __device__ void leave(int row_warp) {
    for (int step = kWarp / 2; step > 0; step /= 2) loss += __shfl_xor_sync(0xffffffffu, loss, step);
    float* to = floats(at.parts) + row_warp * (kMost + 2);
    if (lane < kMost) to[lane] = bias;
    if (lane == 0) *reinterpret_cast<double*>(to + kMost) = loss;
  }

  // The bias, the zeros behind it, and the chunk's loss, by the first row warp.
  __device__ void store(float* partial, float* losses) {
    const int64_t stride = q.stride();
    const float* from = floats(at.parts);
    double total = 0;
    float sum = 0;
    for (int w = 0; w < S::kRowWarps; ++w, from += kMost + 2) {
      total += *reinterpret_cast<const double*>(from + kMost);
      if (lane < kMost) sum += from[lane];
    }
    if (q.backward && lane < chunk.columns)
      for (int64_t d = q.features; d < stride; ++d) partial[lane * stride + d] = q.bias && d == q.features ? sum : 0.0f;
    if (lane == 0 && glm_is_loss(q.rows_function.function)) *losses = static_cast<float>(total);
  }
};

// Where a block's warps are in the tiles of a chunk, and its barriers: the same ones for product warps and row warps,
// which come to them from loops of their own, so that neither holds registers for the other's work.
template <typename Stored, typename S>
struct Tiles {
  Copies<Stored, S> copies;
  int stages, count, tile = 0, stage = 0;

  __device__ Tiles(const GlmProduct<float>& q, const Layout& at, const Chunk& chunk, unsigned char* shared, bool by_16)
      : copies(q, at, chunk, shared, by_16), stages(at.stages), count((chunk.count + S::kTileRows - 1) / S::kTileRows) {
    for (int k = 0; k < stages - kWorkedOn; ++k) copies.next();
  }

  // After it the tile is there, if there is one, and all are done with the one before the last, whose place the next
  // copy takes.
  __device__ void wait() {
    wait_copies_but(stages - kWorkedOn - 1);
    meet_block();
    copies.next();
  }
  __device__ void advance() {
    tile += 1;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
};

template <typename Stored, typename S>
__device__ void work_on_products(const GlmProduct<float>& q, const Layout& at, const Chunk& chunk, float* partial,
                                 bool by_16, unsigned char* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Tiles<Stored, S> tiles(q, at, chunk, shared, by_16);
  Share<Stored, S> share(lane, warp, q.features);
  share.load(q, chunk);
  float* part = reinterpret_cast<float*>(shared + at.parts) + warp * at.part_size;
  const float* finished = reinterpret_cast<const float*>(shared + at.finished);
  const unsigned char* before = nullptr;  // the tile before
  for (; tiles.tile <= tiles.count; tiles.advance()) {
    const unsigned char* now = shared + tiles.stage * S::kTileRows * at.pitch;
    tiles.wait();
    if (q.forward && tiles.tile < tiles.count) share.forward(now, at.pitch, chunk.columns, part);
    meet_block();
    if (q.backward && tiles.tile > 0)
      share.backward(before, at.pitch, finished + (tiles.tile - 1) % 2 * kMost * S::kFinishedPitch);
    before = now;
  }
  if (q.backward) share.store(q, chunk, partial);
}

template <typename Stored, typename S>
__device__ void work_on_rows(const GlmProduct<float>& q, const Layout& at, const Chunk& chunk, bool by_16,
                             unsigned char* shared) {
  const int row_warp = threadIdx.x / kWarp - S::kProductWarps;
  Tiles<Stored, S> tiles(q, at, chunk, shared, by_16);
  RowsOfTile<S> rows{q, at, chunk, shared, static_cast<int>(threadIdx.x % kWarp), row_warp * S::kRowsPerWarp};
  for (; tiles.tile <= tiles.count; tiles.advance()) {
    tiles.wait();
    meet_block();  // the parts of U are there
    if (tiles.tile < tiles.count) rows.run(tiles.tile, tiles.stage);
  }
  rows.leave(row_warp);
}

// Block (x, y): chunk x of the task and the right-hand sides y.
template <typename Stored, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    glm_tensor_kernel(GlmProduct<float> q, Layout at, int per_pass, int passes, bool by_16) {
  MLOPT_DYNAMIC_SHARED(shared);
  // Features past the end, in rows whose length is not a multiple of a step's, stay zero.
  const int features = static_cast<int>(q.features), warp = threadIdx.x / kWarp;
  for (int row = threadIdx.x; row < at.stages * S::kTileRows; row += S::kThreads)
    for (int d = features; d % kDepth != 0; ++d) reinterpret_cast<Stored*>(shared + row * at.pitch)[d] = Stored{};
  __syncthreads();
  for (int64_t unit = blockIdx.y; unit < q.tasks * passes; unit += gridDim.y) {
    Chunk chunk{};
    chunk.task = unit / passes;
    chunk.first_rhs = unit % passes * per_pass;
    chunk.num_rhs = static_cast<int>(q.rhs - chunk.first_rhs < per_pass ? q.rhs - chunk.first_rhs : per_pass);
    chunk.columns = chunk.num_rhs * static_cast<int>(q.classes);
    chunk.begin = blockIdx.x * q.chunk_rows;
    chunk.count = static_cast<int>(q.rows - chunk.begin < q.chunk_rows ? q.rows - chunk.begin : q.chunk_rows);
    float* partial =
        q.partials + (chunk.task * q.num_chunks() + blockIdx.x) * glm_partial_size(q.columns(), q.stride());
    float* own = partial + chunk.first_rhs * q.classes * q.stride();
    if (warp < S::kProductWarps)
      work_on_products<Stored, S>(q, at, chunk, own, by_16, shared);
    else
      work_on_rows<Stored, S>(q, at, chunk, by_16, shared);
    __syncthreads();  // all have left their sums of rows; the next task may overwrite the tiles
    if (warp == S::kProductWarps)
      RowsOfTile<S>{q, at, chunk, shared, static_cast<int>(threadIdx.x % kWarp), 0}.store(
          own, partial + q.columns() * (q.stride() + kGlmRowBlock));
  }
}

#ifdef MLOPT_CUDA_EMULATION
struct Device {
  int multiprocessors = 3, shared_bytes = 227 * 1024;
};
inline Device device_at_hand() { return {}; }
template <typename Kernel>
bool allow_shared(Kernel, int) {
  return true;
}
#else
struct Device {
  int multiprocessors = 1, shared_bytes = 0;
};
Device device_at_hand() {
  Device found;
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return found;
}
template <typename Kernel>
bool allow_shared(Kernel kernel, int bytes) {
  const bool allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess;
  if (!allowed) cudaGetLastError();  // it is told of by nobody: another kernel takes over
  return allowed;
}
#endif

// Whether the product was launched in this shape.
template <typename Stored, typename S>
bool launch(const GlmProduct<float>& q, int shared_bytes, mlopt_stream stream) {
  if (q.features < S::kFewestFeatures || q.features > S::kMostFeatures) return false;
  const Layout at = layout_for<Stored, S>(q, shared_bytes);
  if (at.stages < kFewestStages || !allow_shared(glm_tensor_kernel<Stored, S>, at.size)) return false;
  const int per_pass = static_cast<int>(rhs_per_pass(q)), passes = static_cast<int>((q.rhs + per_pass - 1) / per_pass);
  const int64_t units = q.tasks * passes;
  const dim3 grid(static_cast<unsigned>(q.num_chunks()),
                  static_cast<unsigned>(units < kMostTasks ? units : kMostTasks));
  const bool by_16 = reinterpret_cast<uintptr_t>(q.x) % 16 == 0 && q.features * sizeof(Stored) % 16 == 0;
  MLOPT_LAUNCH_SHARED((glm_tensor_kernel<Stored, S>), grid, dim3(S::kThreads), at.size, stream, q, at, per_pass, passes,
                      by_16);
  return true;
}

template <typename Stored>
bool sweep(const GlmProduct<float>& q, mlopt_stream stream) {
  // Rows of halves whose length is odd are aligned to two bytes only.
  if (q.features * sizeof(Stored) % 4 != 0 || reinterpret_cast<uintptr_t>(q.x) % 4 != 0) return false;
  const int bytes = device_at_hand().shared_bytes;
  return launch<Stored, Few>(q, bytes, stream) || launch<Stored, Some>(q, bytes, stream) ||
         launch<Stored, Many>(q, bytes, stream) || launch<Stored, More>(q, bytes, stream) ||
         launch<Stored, Most>(q, bytes, stream);
}

}  // namespace
}  // namespace tensor_sweep

bool glm_sweep_tensor(const GlmProduct<float>& q, mlopt_stream stream) {
  using namespace tensor_sweep;
  if (!glm_fits_tensor_cores(q.features, q.classes) || (!q.forward && q.rhs != 1)) return false;
  if (q.storage == kGlmFloat16) return sweep<Float16>(q, stream);
  if (q.storage == kGlmBFloat16) return sweep<BFloat16>(q, stream);
  return sweep<float>(q, stream);
}

int64_t glm_chunk_rows_cuda(int64_t tasks, int64_t rows, int64_t features, int64_t classes, int64_t rhs, bool wide) {
  using namespace tensor_sweep;
  if (wide || !glm_fits_tensor_cores(features, classes))
    return glm_chunk_rows(rows, features, rhs * classes, 512, int64_t(1) << 15);
  // A block per multiprocessor, as its shared memory holds one.
  const int64_t passes = (rhs + kMost / classes - 1) / (kMost / classes), units = std::max<int64_t>(1, tasks * passes);
  const int64_t chunks = std::max<int64_t>(1, device_at_hand().multiprocessors / units);
  const int64_t fewest = std::max<int64_t>(kGlmRowBlock, 2 * rhs * classes);  // see glm_chunk_rows
  return round_up(std::max(fewest, (rows + chunks - 1) / chunks), kUnitRows);
}

}  // namespace mlopt
