// The sweep of the family `glm` on tensor cores: float32 products, X read once from device memory.
//
// Both products are taken with the classes as the rows of the unit's tiles, U^T = V^T X^T and out^T = f(U)^T X: V and
// the sum of a block stay in registers, spread over the warps by features, for all rows of the block's chunk. Tiles of
// kTileRows rows of X stream through shared memory, several on their way at any time, and serve both products there.
// Each float is split into two numbers the unit reads exactly, see tensor_core.cuh.
//
// The work on a tile takes three turns, with one barrier of the block per turn: the warps multiply forward; one more
// warp sums their parts and applies f, while they go on with the tiles before and after; the warps multiply backward.
#include <algorithm>

#include "../common/half.h"
#include "../common/tensor_core.cuh"
#include "glm_tensor.h"

namespace mlopt {
namespace tensor_sweep {
namespace {

// The last warp applies f. Twelve: three for each quarter of a multiprocessor, with 168 registers per thread.
constexpr int kWarp = 32, kProductWarps = 11, kRowWarp = kProductWarps;
constexpr int kTensorThreads = (kProductWarps + 1) * kWarp;
constexpr int kTileRows = 8, kDepth = 8;  // of a tile: rows, and features per step of a product
constexpr int kMost = kGlmTensorColumns;  // columns of U, of which a warp's tile has as many
constexpr int kFewestStages = 4, kMostStages = 8;
constexpr int kTurns = 3;                                      // tiles that are worked on at a time
constexpr int kScratchPitch = kMost + 1, kFinishedPitch = 12;  // elements; no two lanes meet in a bank
constexpr int64_t kMostTasks = 65535;
constexpr int64_t kMostValues = 3 * kMost;  // values of f per row that are copied beside X

// Where the parts of shared memory begin, in bytes, and the sizes that go with them.
struct Layout {
  int pitch;  // between rows of a tile: 32 bytes (16 for halves) more than a multiple of 128, so that the lanes that
              // read eight rows of a few features, or four rows of eight, meet in no bank
  int stages;
  int values_per_row;  // copied beside X; 0 if f reads them where they are
  int values, scales, weights, labels, parts, scratch, finished, size;

  __host__ __device__ int tile_bytes() const { return kTileRows * pitch; }
};

int round_up(int64_t value, int64_t multiple) { return static_cast<int>((value + multiple - 1) / multiple * multiple); }

int64_t values_of(const GlmRows<float>& f, int64_t classes) {
  switch (f.function) {
    case kGlmIdentity:
    case kGlmSoftmaxIndex:
      return 0;
    case kGlmRankOne:
      return 3 * classes;
    case kGlmBlock:
      return classes * classes;
    default:
      return f.per_row ? 1 : classes;
  }
}

template <typename Stored>
Layout layout_for(const GlmProduct<float>& q, int limit) {
  Layout at{};
  const int offset = sizeof(Stored) == 4 ? 32 : 16;
  at.pitch = round_up(round_up(q.features, kDepth) * static_cast<int64_t>(sizeof(Stored)) - offset, 128) + offset;
  const int64_t values = q.forward ? values_of(q.rows_function, q.classes) : q.classes;
  at.values_per_row = values <= kMostValues ? static_cast<int>(values) : 0;
  for (at.stages = kMostStages; at.stages >= kFewestStages; --at.stages) {
    const int rows = at.stages * kTileRows, width = static_cast<int>(q.classes);
    at.values = at.stages * at.tile_bytes();
    at.scales = at.values + round_up(rows * at.values_per_row * 4, 16);
    at.weights = at.scales + (q.rows_function.scales != nullptr ? round_up(rows * width * 4, 16) : 0);
    at.labels = at.weights + rows * 4;
    at.parts = at.labels + rows * 8;
    at.scratch = at.parts + 2 * kProductWarps * kMost * kTileRows * 4;
    at.finished = at.scratch + round_up(kTileRows * kScratchPitch * 4, 16);
    at.size = at.finished + 2 * kMost * kFinishedPitch * 4;
    if (at.size <= limit) break;
  }
  return at;
}

// What a block works on: rows [begin, begin + count) of a task, and some of its right-hand sides.
struct Chunk {
  int64_t task, begin, count, first_rhs, num_rhs;
  int columns, tiles;

  __device__ int rows_of(int tile) const {
    const int64_t left = count - int64_t(tile) * kTileRows;
    return static_cast<int>(left < kTileRows ? left : kTileRows);
  }
};

__device__ void wait_copies_but(int pending) {
  switch (pending) {  // the instruction takes a constant
    case 1:
      return wait_copies<1>();
    case 2:
      return wait_copies<2>();
    case 3:
      return wait_copies<3>();
    case 4:
      return wait_copies<4>();
    default:
      return wait_copies<0>();
  }
}

// `count` elements of four bytes by the lanes of a warp.
__device__ void copy_words(void* shared, const void* global, int64_t count, int lane) {
  for (int64_t k = lane; k < count; k += kWarp)
    copy_async4(static_cast<uint32_t*>(shared) + k, static_cast<const uint32_t*>(global) + k, 4);
}

// Asks for what is read of a tile: eight of the product warps for one row of X each, the last warp for the arguments of
// f.
template <typename Stored>
__device__ void copy_tile(const GlmProduct<float>& q, const Layout& at, const Chunk& chunk, int tile, bool by_16,
                          unsigned char* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, stage = tile % at.stages;
  const int rows = chunk.rows_of(tile);
  const int64_t first = chunk.task * q.rows + chunk.begin + int64_t(tile) * kTileRows;
  if (warp < kRowWarp) {
    if (warp >= kTileRows) return;
    // Rows past the end are read from the last one, and are zeros.
    const Stored* row = static_cast<const Stored*>(q.x) + (first + (warp < rows ? warp : rows - 1)) * q.features;
    unsigned char* to = shared + stage * at.tile_bytes() + warp * at.pitch;
    const int bytes = static_cast<int>(q.features * sizeof(Stored)), width = by_16 ? 16 : 4;
    const auto* from = reinterpret_cast<const unsigned char*>(row);
    if (by_16)
      for (int k = lane * 16; k < bytes; k += kWarp * 16) copy_async16(to + k, from + k, warp < rows ? 16 : 0);
    else
      for (int k = lane * width; k < bytes; k += kWarp * width) copy_async4(to + k, from + k, warp < rows ? 4 : 0);
    return;
  }
  const GlmRows<float>& f = q.rows_function;
  const int width = static_cast<int>(q.classes), start = stage * kTileRows;
  if (at.values_per_row > 0) {
    const float* values = q.forward ? f.values + first * at.values_per_row : q.z + first * width;
    copy_words(shared + at.values + start * at.values_per_row * 4, values, rows * at.values_per_row, lane);
  }
  if (!q.forward) return;
  if (f.scales != nullptr)
    copy_words(shared + at.scales + start * width * 4, f.scales + first * width, rows * width, lane);
  if (f.weights != nullptr) copy_words(shared + at.weights + start * 4, f.weights + first, rows, lane);
  if (f.function == kGlmSoftmaxIndex) copy_words(shared + at.labels + start * 8, f.labels + first, 2 * rows, lane);
}

// Two neighbouring elements of a tile, and one.
__device__ float2 pair_of(const float* at) { return *reinterpret_cast<const float2*>(at); }
template <typename Half>
__device__ float2 pair_of(const Half* at) {
  const uint32_t both = *reinterpret_cast<const uint32_t*>(at);
  return {widened(Half{static_cast<uint16_t>(both)}), widened(Half{static_cast<uint16_t>(both >> 16)})};
}

// d += a b, to about the rounding of floats. A half is whole: it has no small part.
template <bool kWhole>
__device__ void multiply(float (&d)[4], float (&small)[4], const uint32_t (&large_a)[4], const uint32_t (&small_a)[4],
                         float b0, float b1) {
  const Split first = split(b0), second = split(b1);
  const uint32_t large_b[2] = {first.large, second.large}, small_b[2] = {first.small, second.small};
  mma_tf32(small, small_a, large_b);
  if constexpr (!kWhole) mma_tf32(small, large_a, small_b);
  mma_tf32(d, large_a, large_b);
}

// A warp's share of both products: every kProductWarps-th step of kDepth features.
template <typename Stored, int kSteps>
struct Share {
  static constexpr bool kWhole = sizeof(Stored) == 2;
  float v[kSteps][4];    // V^T as the left operand of the forward product
  float sum[kSteps][4];  // f(U)^T X
  int group, in_group, warp, count = 0;

  __device__ Share(int lane, int warp_) : group(lane / 4), in_group(lane % 4), warp(warp_) {}

  __device__ int feature(int step) const { return (step * kProductWarps + warp) * kDepth; }

  __device__ void load(const GlmProduct<float>& q, const Chunk& chunk) {
    const int64_t stride = q.stride();
    const float* from = q.v + (chunk.task * q.rhs + chunk.first_rhs) * q.classes * stride;
    const int features = static_cast<int>(q.features), steps = (features + kDepth - 1) / kDepth;
    count = (steps - warp + kProductWarps - 1) / kProductWarps;
    for (int j = 0; j < kSteps; ++j)
      for (int i = 0; i < 4; ++i) {
        // The sum over features may go in any order: their pairs 2t, 2t + 1 are what the unit has as t, t + 4.
        const int column = group + i % 2 * 8, d = feature(j) + 2 * in_group + i / 2;
        v[j][i] = q.forward && column < chunk.columns && d < features ? from[column * stride + d] : 0.0f;
        sum[j][i] = 0.0f;
      }
  }

  // Writes this warp's part of U^T for a tile, [kMost, kTileRows].
  __device__ void forward(const unsigned char* tile, int pitch, float* part) const {
    float large[4] = {}, small[4] = {};
    const unsigned char* row = tile + group * pitch + 2 * in_group * sizeof(Stored);
    MLOPT_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      if (j >= count) break;
      const float2 x = pair_of(reinterpret_cast<const Stored*>(row) + feature(j));
      uint32_t large_v[4], small_v[4];
      for (int i = 0; i < 4; ++i) {
        const Split parts = split(v[j][i]);
        large_v[i] = parts.large;
        small_v[i] = parts.small;
      }
      multiply<kWhole>(large, small, large_v, small_v, x.x, x.y);
    }
    float* to = part + group * kTileRows + 2 * in_group;
    to[0] = large[0] + small[0];
    to[1] = large[1] + small[1];
    to[8 * kTileRows] = large[2] + small[2];
    to[8 * kTileRows + 1] = large[3] + small[3];
  }

  // sum += f(U)^T X for a tile; `finished` is f(U)^T.
  __device__ void backward(const unsigned char* tile, int pitch, const float* finished) {
    uint32_t large_u[4], small_u[4];
    for (int i = 0; i < 4; ++i) {
      const Split parts = split(finished[(group + i % 2 * 8) * kFinishedPitch + in_group + i / 2 * 4]);
      large_u[i] = parts.large;
      small_u[i] = parts.small;
    }
    const auto* upper = reinterpret_cast<const Stored*>(tile + in_group * pitch) + group;
    const auto* lower = reinterpret_cast<const Stored*>(tile + (in_group + 4) * pitch) + group;
    MLOPT_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      if (j >= count) break;
      multiply<kWhole>(sum[j], sum[j], large_u, small_u, widened(upper[feature(j)]), widened(lower[feature(j)]));
    }
  }

  __device__ void store(const GlmProduct<float>& q, const Chunk& chunk, float* partial) const {
    const int64_t stride = q.stride();
    for (int j = 0; j < kSteps; ++j)
      for (int i = 0; i < 4; ++i) {
        const int column = group + i / 2 * 8, d = feature(j) + 2 * in_group + i % 2;
        if (j < count && column < chunk.columns && d < q.features) partial[column * stride + d] = sum[j][i];
      }
  }
};

// The work of the last warp: U from its parts, then f, for the tiles of a chunk.
struct RowsOfTile {
  const GlmProduct<float>& q;
  const Layout& at;
  const Chunk& chunk;
  unsigned char* shared;
  int lane;
  double loss = 0;
  float bias = 0;  // of the lane's column: the sum over rows

  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }

  // The arguments of f for the rows of a tile, where they were copied to.
  __device__ GlmRows<float> arguments(int tile, int64_t first) const {
    GlmRows<float> f = q.rows_function;
    const int start = tile % at.stages * kTileRows;
    if (f.values != nullptr)
      f.values = at.values_per_row > 0 ? floats(at.values) + start * at.values_per_row
                                       : f.values + first * q.classes * q.classes;  // a block per row
    if (f.scales != nullptr) f.scales = floats(at.scales) + start * q.classes;
    if (f.weights != nullptr) f.weights = floats(at.weights) + start;
    if (f.labels != nullptr) f.labels = reinterpret_cast<const int64_t*>(shared + at.labels) + start;
    return f;
  }

  __device__ void run(int tile) {
    const int rows = chunk.rows_of(tile), width = static_cast<int>(q.classes);
    const int64_t row0 = chunk.begin + int64_t(tile) * kTileRows;
    float* u = floats(at.scratch);
    if (q.forward) {
      const float* parts = floats(at.parts) + tile % 2 * kProductWarps * kMost * kTileRows;
      const int64_t stride = q.stride();
      const float* v = q.v + (chunk.task * q.rhs + chunk.first_rhs) * q.classes * stride;
      for (int k = lane; k < kMost * kTileRows; k += kWarp) {
        const int column = k / kTileRows;
        float sum = q.bias && column < chunk.columns ? v[column * stride + q.features] : 0.0f;
        for (int w = 0; w < kProductWarps; ++w) sum += parts[w * kMost * kTileRows + k];
        u[k % kTileRows * kScratchPitch + column] = sum;
      }
    } else {
      const float* given = floats(at.values) + tile % at.stages * kTileRows * width;
      for (int k = lane; k < rows * width; k += kWarp) u[k / width * kScratchPitch + k % width] = given[k];
    }
    __syncwarp();
    if (q.forward) {
      const GlmRows<float> f = arguments(tile, chunk.task * q.rows + row0);
      const bool is_loss = glm_is_loss(f.function);
      for (int k = lane; k < rows * static_cast<int>(chunk.num_rhs); k += kWarp) {
        const int row = k % rows, j = k / rows;
        float* mine = u + row * kScratchPitch + j * width;
        float* other = q.z == nullptr
                           ? nullptr
                           : q.z + ((chunk.task * q.rhs + chunk.first_rhs + j) * q.rows + row0 + row) * q.classes;
        loss += glm_row(f, row, q.classes, mine, is_loss ? other : nullptr);
        if (!q.backward)
          for (int c = 0; c < width; ++c) other[c] = mine[c];
      }
      __syncwarp();
    }
    if (!q.backward) return;
    float* finished = floats(at.finished) + tile % 2 * kMost * kFinishedPitch;
    for (int k = lane; k < kMost * kTileRows; k += kWarp) {
      const int column = k / kTileRows, row = k % kTileRows;
      const bool exists = column < chunk.columns && row < rows;
      finished[column * kFinishedPitch + row] = exists ? u[row * kScratchPitch + column] : 0.0f;
    }
    if (q.bias && lane < chunk.columns)
      for (int row = 0; row < rows; ++row) bias += u[row * kScratchPitch + lane];
    __syncwarp();
  }

  // The bias, the zeros behind it, and the chunk's loss.
  __device__ void store(float* partial, float* losses) {
    const int64_t stride = q.stride();
    if (q.backward && lane < chunk.columns)
      for (int64_t d = q.features; d < stride; ++d)
        partial[lane * stride + d] = q.bias && d == q.features ? bias : 0.0f;
    for (int step = kWarp / 2; step > 0; step /= 2) loss += __shfl_xor_sync(0xffffffffu, loss, step);
    if (lane == 0 && glm_is_loss(q.rows_function.function)) *losses = static_cast<float>(loss);
  }
};

// Block (x, y): chunk x of the task and the right-hand sides y.
template <typename Stored, int kSteps>
__global__ void __launch_bounds__(kTensorThreads, 1)
    glm_tensor_kernel(GlmProduct<float> q, Layout at, int passes, bool by_16) {
  MLOPT_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Features past the end, in rows whose length is not a multiple of a step's, stay zero.
  const int features = static_cast<int>(q.features);
  for (int row = threadIdx.x; row < at.stages * kTileRows; row += kTensorThreads)
    for (int d = features; d % kDepth != 0; ++d) reinterpret_cast<Stored*>(shared + row * at.pitch)[d] = Stored{};
  __syncthreads();
  for (int64_t unit = blockIdx.y; unit < q.tasks * passes; unit += gridDim.y) {
    const int64_t per_pass = kMost / q.classes;
    Chunk chunk{};
    chunk.task = unit / passes;
    chunk.first_rhs = unit % passes * per_pass;
    chunk.num_rhs = q.rhs - chunk.first_rhs < per_pass ? q.rhs - chunk.first_rhs : per_pass;
    chunk.columns = static_cast<int>(chunk.num_rhs * q.classes);
    chunk.begin = blockIdx.x * q.chunk_rows;
    chunk.count = q.rows - chunk.begin < q.chunk_rows ? q.rows - chunk.begin : q.chunk_rows;
    chunk.tiles = static_cast<int>((chunk.count + kTileRows - 1) / kTileRows);
    const int ahead = at.stages - kTurns;
    for (int tile = 0; tile < ahead; ++tile) {
      if (tile < chunk.tiles) copy_tile<Stored>(q, at, chunk, tile, by_16, shared);
      commit_copies();
    }
    float* partial =
        q.partials + (chunk.task * q.num_chunks() + blockIdx.x) * glm_partial_size(q.columns(), q.stride());
    float* own = partial + chunk.first_rhs * q.classes * q.stride();
    RowsOfTile rows{q, at, chunk, shared, lane};
    Share<Stored, kSteps> share(lane, warp);
    if (warp != kRowWarp) share.load(q, chunk);
    float* parts = reinterpret_cast<float*>(shared + at.parts);
    const float* finished = reinterpret_cast<const float*>(shared + at.finished);
    for (int turn = 0; turn < chunk.tiles + kTurns - 1; ++turn) {
      wait_copies_but(ahead - 1);
      __syncthreads();
      if (turn + ahead < chunk.tiles) copy_tile<Stored>(q, at, chunk, turn + ahead, by_16, shared);
      commit_copies();
      if (warp == kRowWarp) {
        if (turn >= 1 && turn <= chunk.tiles) rows.run(turn - 1);
        continue;
      }
      if (turn >= 2 && q.backward)
        share.backward(shared + (turn - 2) % at.stages * at.tile_bytes(), at.pitch,
                       finished + (turn - 2) % 2 * kMost * kFinishedPitch);
      if (turn < chunk.tiles && q.forward)
        share.forward(shared + turn % at.stages * at.tile_bytes(), at.pitch,
                      parts + (turn % 2 * kProductWarps + warp) * kMost * kTileRows);
    }
    if (warp == kRowWarp) rows.store(own, partial + q.columns() * (q.stride() + kGlmRowBlock));
    if (warp != kRowWarp && q.backward) share.store(q, chunk, own);
    __syncthreads();  // the next task overwrites the tiles
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
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess;
}
#endif

template <typename Stored, int kSteps>
bool launch(const GlmProduct<float>& q, const Layout& at, mlopt_stream stream) {
  if (!allow_shared(glm_tensor_kernel<Stored, kSteps>, at.size)) return false;
  const int passes = static_cast<int>((q.rhs + kMost / q.classes - 1) / (kMost / q.classes));
  const int64_t units = q.tasks * passes;
  const dim3 grid(static_cast<unsigned>(q.num_chunks()),
                  static_cast<unsigned>(units < kMostTasks ? units : kMostTasks));
  const bool by_16 = reinterpret_cast<uintptr_t>(q.x) % 16 == 0 && q.features * sizeof(Stored) % 16 == 0;
  MLOPT_LAUNCH_SHARED((glm_tensor_kernel<Stored, kSteps>), grid, dim3(kTensorThreads), at.size, stream, q, at, passes,
                      by_16);
  return true;
}

template <typename Stored>
bool sweep(const GlmProduct<float>& q, mlopt_stream stream) {
  // Rows of halves whose length is odd are aligned to two bytes only.
  if (q.features * sizeof(Stored) % 4 != 0 || reinterpret_cast<uintptr_t>(q.x) % 4 != 0) return false;
  const Device device = device_at_hand();
  const Layout at = layout_for<Stored>(q, device.shared_bytes);
  if (at.stages < kFewestStages) return false;
  constexpr int kFeaturesPerStep = kProductWarps * kDepth;
  static_assert(kGlmTensorMostFeatures == 16 * kFeaturesPerStep);
  if (q.features <= 4 * kFeaturesPerStep) return launch<Stored, 4>(q, at, stream);
  if (q.features <= 12 * kFeaturesPerStep) return launch<Stored, 12>(q, at, stream);
  return launch<Stored, 16>(q, at, stream);
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
  return round_up(std::max(fewest, (rows + chunks - 1) / chunks), kTileRows);
}

}  // namespace mlopt
