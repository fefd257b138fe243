// Runs CUDA kernels on the host, to test their logic where there is no GPU.
//
// A kernel compiles as an ordinary function. Its blocks run one after another; the threads of a block run as fibers
// (ucontext) that switch at __syncthreads and at what a warp does together. That checks indexing, tails, reductions and
// the placement of barriers: a block or warp whose threads wait at different barriers, or of which some end while
// others wait, is an error. Run under both schedules below, it also shows what lacks a barrier between warps, or a wait
// for copies that go on in the meantime. It cannot check all orders of memory accesses, or speed. Under
// AddressSanitizer it finds accesses out of bounds.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one at a time, so one copy serves
#define __syncthreads() mlopt::emulation::wait_at_barrier(mlopt::emulation::kBlockWaits, __FILE__, __LINE__)
#define __syncwarp() mlopt::emulation::wait_at_barrier(mlopt::emulation::kWarpWaits, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lane) mlopt::emulation::shuffle_xor(value, lane, __FILE__, __LINE__)
#define __launch_bounds__(...)
#define MLOPT_DYNAMIC_SHARED(name) unsigned char* const name = mlopt::emulation::dynamic_shared.data()
#define MLOPT_LAUNCH(kernel, grid, block, stream, ...) MLOPT_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define MLOPT_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  (static_cast<void>(stream), mlopt::emulation::launch(grid, block, bytes, [=] { kernel(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct float2 {
  float x, y;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace mlopt::emulation {

constexpr size_t kStackSize = 64 * 1024;
constexpr size_t kWarpSize = 32;

enum State { kReady, kWarpWaits, kBlockWaits, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackSize]};
  State state = kReady;
  const char* file = nullptr;  // the barrier it waits at
  int line = 0;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;
inline std::vector<unsigned char> dynamic_shared;

// In what order the threads between two barriers run, and when the copies into shared memory are made that go on in the
// meantime: as they are asked for, or at the last moment, when they are waited for. A GPU may do either; a barrier or a
// wait that is missing shows in one of them.
struct Schedule {
  bool backwards = false, late_copies = false;
};
inline Schedule schedule;

inline void wait_at_barrier(State state, const char* file, int line) {
  current->state = state;
  current->file = file;
  current->line = line;
  swapcontext(&current->context, &scheduler);
}

// What every thread of a warp gives, seen by all of them.
template <typename T>
class Exchange {
 public:
  Exchange(const T& mine, const char* file, int line) : file_(file), line_(line) {
    values()[threadIdx.x] = mine;
    wait_at_barrier(kWarpWaits, file, line);
  }
  ~Exchange() { wait_at_barrier(kWarpWaits, file_, line_); }  // the next exchange writes the values
  const T& of(size_t lane) const { return values()[threadIdx.x / kWarpSize * kWarpSize + lane]; }

 private:
  static T* values() {
    static T all[1024];
    return all;
  }
  const char* file_;
  int line_;
};

template <typename T>
T shuffle_xor(T value, int lane, const char* file, int line) {
  const Exchange<T> all(value, file, line);
  return all.of((threadIdx.x % kWarpSize) ^ static_cast<size_t>(lane));
}

inline void enter() {
  (*body)();
  current->state = kDone;
  swapcontext(&current->context, &scheduler);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: block (%u, %u): %s\n", blockIdx.x, blockIdx.y, what);
  std::exit(1);
}

// Lets threads that all wait at one barrier go on.
inline void release(Fiber* first, size_t count) {
  for (size_t t = 0; t < count; ++t) {
    if (first[t].state == kDone) fail("some threads ended while others wait at a barrier");
    if (first[t].state != first->state || first[t].line != first->line || first[t].file != first->file)
      fail(first->state == kWarpWaits ? "threads of one warp wait at different barriers"
                                      : "threads of one block wait at different barriers");
  }
  for (size_t t = 0; t < count; ++t) first[t].state = kReady;
}

// Runs the threads of a warp until all have ended or wait for the block.
inline void run_warp(std::vector<Fiber>& fibers, size_t begin, size_t end) {
  const auto is = [](State state) { return [state](const Fiber& fiber) { return fiber.state == state; }; };
  const auto first = fibers.begin() + begin, last = fibers.begin() + end;
  while (std::any_of(first, last, is(kReady))) {
    for (size_t k = begin; k < end; ++k) {
      const size_t t = schedule.backwards ? end - 1 - (k - begin) : k;
      if (fibers[t].state != kReady) continue;
      threadIdx = dim3(static_cast<unsigned>(t), 0, 0);
      current = &fibers[t];
      swapcontext(&scheduler, &current->context);
    }
    if (std::any_of(first, last, is(kWarpWaits))) release(&fibers[begin], end - begin);
  }
}

inline void run_block(std::vector<Fiber>& fibers) {
  for (auto& fiber : fibers) {
    fiber.state = kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackSize;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  const size_t count = fibers.size();
  while (true) {
    const size_t warps = (count + kWarpSize - 1) / kWarpSize;
    for (size_t k = 0; k < warps; ++k) {
      const size_t begin = (schedule.backwards ? warps - 1 - k : k) * kWarpSize;
      run_warp(fibers, begin, std::min(begin + kWarpSize, count));
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == kDone; })) return;
    release(fibers.data(), count);
  }
}

// One-dimensional blocks are all that the kernels use.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || block.x == 0 || block.x > 1024) {
    std::fprintf(stderr, "cuda emulation: no device runs %u x %u blocks of %u threads\n", grid.x, grid.y, block.x);
    std::exit(1);
  }
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  dynamic_shared.assign(shared_bytes, 0xff);  // NaN, until it is written
  std::vector<Fiber> fibers(block.x);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(fibers);
    }
}

// ---- what csrc/common/tensor_core.cuh has instructions for ----

struct Copy {
  void* shared;
  const void* global;
  int size, bytes;  // the bytes after the first `bytes` are zeros

  void make() const {
    std::memset(shared, 0, size);
    std::memcpy(shared, global, bytes);
  }
};
// Of each thread: its groups of copies that are not made yet; the last one is still open.
inline std::vector<std::vector<std::vector<Copy>>> copies(1024, {{}});

inline void copy_async(const Copy& copy) {
  if (schedule.late_copies)
    copies[threadIdx.x].back().push_back(copy);
  else
    copy.make();
}
inline void commit_copies() { copies[threadIdx.x].emplace_back(); }
template <int kPending>
void wait_copies() {
  auto& groups = copies[threadIdx.x];
  while (groups.size() > kPending + 1) {
    for (const Copy& copy : groups.front()) copy.make();
    groups.erase(groups.begin());
  }
}

inline float tf32_bits(uint32_t bits) {  // the unit ignores the last 13 bits
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// d += a b for a of 16 x 8 and b of 8 x 8, spread over the lanes of a warp as mma.m16n8k8 has them.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Given {
    uint32_t a[4], b[2];
  };
  const Given mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Exchange<Given> all(mine, __FILE__, __LINE__);
  const size_t lane = threadIdx.x % kWarpSize;
  for (size_t i = 0; i < 4; ++i) {
    const size_t row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    for (size_t k = 0; k < 8; ++k) {
      const Given& left = all.of(row % 8 * 4 + k % 4);
      const Given& right = all.of(column * 4 + k % 4);
      d[i] += tf32_bits(left.a[row / 8 + k / 4 * 2]) * tf32_bits(right.b[k / 4]);
    }
  }
}

}  // namespace mlopt::emulation
