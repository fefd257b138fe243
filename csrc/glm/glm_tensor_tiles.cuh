// What the sweep on tensor cores has in shared memory, and how it gets there: the shapes of blocks, the layout, and the
// copies of tiles of X and of the arguments of f. Included by glm_tensor.cu alone.
#pragma once

#include <algorithm>

#include "../common/tensor_core.cuh"
#include "glm_tensor.h"

namespace mlopt {
namespace tensor_sweep {
namespace {

constexpr int kWarp = 32;
constexpr int kUnitRows = 8, kDepth = 8;  // of a step of a product: rows, and features
constexpr int kMost = kGlmTensorColumns;  // columns of U, as many as a step has
constexpr int kFewestStages = 3, kMostStages = 6;
constexpr int kWorkedOn = 2;              // tiles at a time: one forward, the one before backward
constexpr int kScratchPitch = kMost + 1;  // elements; no two lanes meet in a bank
constexpr int64_t kMostTasks = 65535;
constexpr int64_t kMostValues = 3 * kMost;  // values of f per row that are copied beside X

// How a block is made. Large tiles, as there are two barriers for each; but V and the sums have to fit into registers
// (128 per thread of 16 warps, 168 of 12), and the tiles into shared memory.
template <int kProductWarps_, int kRowWarps_, int kTileRows_, int kSteps_, int kSureSteps_>
struct Shape {
  static constexpr int kProductWarps = kProductWarps_, kRowWarps = kRowWarps_, kTileRows = kTileRows_;
  // Of features per product warp: steps, and how many of them every warp has.
  static constexpr int kSteps = kSteps_, kSureSteps = kSureSteps_;
  static constexpr int kWarps = kProductWarps + kRowWarps, kThreads = kWarps * kWarp;
  static constexpr int kUnits = kTileRows / kUnitRows, kRowsPerWarp = kTileRows / kRowWarps;
  static constexpr int kTeam = kWarp / kRowsPerWarp;  // lanes of a row warp that work on a row together
  static constexpr int kMostFeatures = kSteps * kProductWarps * kDepth;
  static constexpr int kFewestFeatures = kSureSteps * kProductWarps * kDepth;
  // Elements between columns; no two lanes meet in a bank.
  static constexpr int kPartPitch = kUnits == 1 ? 8 : 24, kFinishedPitch = kUnits == 1 ? 12 : 20;
  static_assert(kTileRows % kUnitRows == 0 && kUnits <= 2 && kTileRows % kRowWarps == 0 && kTileRows <= kWarps);
};
using Few = Shape<14, 2, 16, 2, 0>;
using Some = Shape<14, 2, 16, 5, 2>;
using Many = Shape<14, 2, 16, 7, 5>;
using More = Shape<11, 1, 8, 12, 0>;
using Most = Shape<11, 1, 8, 16, 12>;
static_assert(kGlmTensorMostFeatures == Most::kMostFeatures);

// Where the parts of shared memory begin, in bytes, and the sizes that go with them.
struct Layout {
  int pitch;  // between rows of a tile: 32 bytes (16 for halves) more than a multiple of 128, so that the lanes that
              // read eight rows of a few features, or four rows of eight, meet in no bank
  int stages;
  int values_per_row;  // copied beside X; 0 if f reads them where they are
  int part_size;       // elements
  int values, scales, weights, labels, parts, scratch, finished, size;
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

int64_t rhs_per_pass(const GlmProduct<float>& q) { return std::min<int64_t>(q.rhs, kMost / q.classes); }

template <typename Stored, typename S>
Layout layout_for(const GlmProduct<float>& q, int limit) {
  Layout at{};
  const GlmRows<float>& f = q.rows_function;
  const int offset = sizeof(Stored) == 4 ? 32 : 16;
  at.pitch = round_up(round_up(q.features, kDepth) * static_cast<int64_t>(sizeof(Stored)) - offset, 128) + offset;
  const int64_t values = q.forward ? values_of(f, q.classes) : q.classes;
  at.values_per_row = values <= kMostValues ? static_cast<int>(values) : 0;
  at.part_size = static_cast<int>(rhs_per_pass(q) * q.classes) * S::kPartPitch;
  for (at.stages = kMostStages; at.stages >= kFewestStages; --at.stages) {
    const int rows = at.stages * S::kTileRows, width = static_cast<int>(q.classes);
    at.values = rows * at.pitch;
    at.scales = at.values + round_up(rows * at.values_per_row * 4, 16);
    at.weights = at.scales + (f.scales != nullptr ? round_up(rows * width * 4, 16) : 0);
    at.labels = at.weights + (f.weights != nullptr ? rows * 4 : 0);
    at.parts = at.labels + (f.function == kGlmSoftmaxIndex ? rows * 8 : 0);
    at.scratch = at.parts + S::kProductWarps * at.part_size * 4;
    at.finished = at.scratch + round_up(S::kTileRows * kScratchPitch * 4, 16);
    at.size = at.finished + 2 * kMost * S::kFinishedPitch * 4;
    if (at.size <= limit) break;
  }
  return at;
}

// What a block works on: rows [begin, begin + count) of a task, and some of its right-hand sides.
struct Chunk {
  int64_t task, begin, first_rhs;
  int count, num_rhs, columns;

  // Rows from `row` on, at most `most`; none past the end.
  __device__ int rows_from(int row, int most) const {
    const int left = count - row;
    return left < 0 ? 0 : left < most ? left : most;
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
__device__ void copy_words(void* shared, const void* global, int count, int lane) {
  MLOPT_UNROLL_BY(1)
  for (int k = lane; k < count; k += kWarp)
    copy_async4(static_cast<uint32_t*>(shared) + k, static_cast<const uint32_t*>(global) + k, 4);
}

// Asks for what is read of the tiles of a chunk, one after the other: each warp for one row of X, the row warps for the
// arguments of f of their rows.
template <typename Stored, typename S>
struct Copies {
  const GlmProduct<float>& q;
  const Layout& at;
  const Chunk& chunk;
  unsigned char* shared;
  int warp, lane;
  bool by_16;
  int tile = 0, stage = 0;  // of the next
  const unsigned char* row;

  __device__ Copies(const GlmProduct<float>& q_, const Layout& at_, const Chunk& chunk_, unsigned char* shared_,
                    bool by_16_)
      : q(q_), at(at_), chunk(chunk_), shared(shared_), by_16(by_16_) {
    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    row = static_cast<const unsigned char*>(q.x) +
          (chunk.task * q.rows + chunk.begin + warp) * q.features * static_cast<int64_t>(sizeof(Stored));
  }

  __device__ void next() {
    if (tile * S::kTileRows < chunk.count) {
      if (warp < S::kTileRows) copy_features();
      if (warp >= S::kProductWarps) copy_arguments();
    }
    commit_copies();
    row += S::kTileRows * q.features * static_cast<int64_t>(sizeof(Stored));
    tile += 1;
    stage = stage + 1 == at.stages ? 0 : stage + 1;
  }

  __device__ void copy_features() {
    // Rows past the end are zeros; nothing is read of them, but from a place that exists.
    const bool exists = tile * S::kTileRows + warp < chunk.count;
    const auto* from = exists ? row : static_cast<const unsigned char*>(q.x);
    unsigned char* to = shared + (stage * S::kTileRows + warp) * at.pitch;
    const int bytes = static_cast<int>(q.features) * static_cast<int>(sizeof(Stored));
    if (by_16) {
      MLOPT_UNROLL_BY(1)
      for (int k = lane * 16; k < bytes; k += kWarp * 16) copy_async16(to + k, from + k, exists ? 16 : 0);
    } else {
      MLOPT_UNROLL_BY(1)
      for (int k = lane * 4; k < bytes; k += kWarp * 4) copy_async4(to + k, from + k, exists ? 4 : 0);
    }
  }

  __device__ void copy_arguments() {
    const GlmRows<float>& f = q.rows_function;
    const int own = (warp - S::kProductWarps) * S::kRowsPerWarp, width = static_cast<int>(q.classes);
    const int start = tile * S::kTileRows + own, rows = chunk.rows_from(start, S::kRowsPerWarp);
    const int to = stage * S::kTileRows + own;
    const int64_t from = chunk.task * q.rows + chunk.begin + start;
    if (at.values_per_row > 0) {
      const float* values = q.forward ? f.values + from * at.values_per_row : q.z + from * width;
      copy_words(shared + at.values + to * at.values_per_row * 4, values, rows * at.values_per_row, lane);
    }
    if (!q.forward) return;
    if (f.scales != nullptr)
      copy_words(shared + at.scales + to * width * 4, f.scales + from * width, rows * width, lane);
    if (f.weights != nullptr) copy_words(shared + at.weights + to * 4, f.weights + from, rows, lane);
    if (f.function == kGlmSoftmaxIndex) copy_words(shared + at.labels + to * 8, f.labels + from, 2 * rows, lane);
  }
};

}  // namespace
}  // namespace tensor_sweep
}  // namespace mlopt
