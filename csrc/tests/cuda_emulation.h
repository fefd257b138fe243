// Runs CUDA kernels on the host, to test their logic where there is no GPU.
//
// A kernel compiles as an ordinary function. Its blocks run one after another; the threads of a block run as fibers
// (ucontext) that switch at __syncthreads and at shuffles. That checks indexing, tails, reductions and the placement of
// barriers: a block whose threads wait at different barriers, or of which some end while others wait, is an error. It
// cannot check races inside a warp, memory ordering, or speed. Under AddressSanitizer it finds accesses out of bounds.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one at a time, so one copy serves
#define __syncthreads() mlopt::emulation::wait_at_barrier(__FILE__, __LINE__)
// Stricter than on a device: all threads of a block must meet at a shuffle, not only those of a warp.
#define __shfl_xor_sync(mask, value, lane) mlopt::emulation::shuffle_xor(value, lane, __FILE__, __LINE__)
#define MLOPT_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), mlopt::emulation::launch(grid, block, [=] { kernel(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace mlopt::emulation {

constexpr size_t kStackSize = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackSize]};
  bool done = false;
  const char* file = nullptr;  // the barrier it waits at
  int line = 0;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;

inline void wait_at_barrier(const char* file, int line) {
  current->file = file;
  current->line = line;
  swapcontext(&current->context, &scheduler);
}

template <typename T>
T shuffle_xor(T value, int lane, const char* file, int line) {
  static T values[1024];
  values[threadIdx.x] = value;
  wait_at_barrier(file, line);
  const T other = values[threadIdx.x ^ static_cast<unsigned>(lane)];
  wait_at_barrier(file, line);  // the next shuffle writes `values`
  return other;
}

inline void enter() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: block (%u, %u): %s\n", blockIdx.x, blockIdx.y, what);
  std::exit(1);
}

inline void run_block(std::vector<Fiber>& fibers) {
  for (auto& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackSize;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t running = fibers.size(); running > 0;) {
    running = 0;
    const Fiber* first = nullptr;
    size_t ended = 0;
    for (size_t t = 0; t < fibers.size(); ++t) {
      threadIdx = dim3(static_cast<unsigned>(t), 0, 0);
      current = &fibers[t];
      swapcontext(&scheduler, &current->context);
      if (current->done) {
        ++ended;
        continue;
      }
      ++running;
      if (first == nullptr) first = current;
      if (current->line != first->line || current->file != first->file)
        fail("threads of one block wait at different barriers");
    }
    if (ended != 0 && running != 0) fail("some threads ended while others wait at a barrier");
  }
}

// One-dimensional blocks are all that the kernels use.
inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  std::vector<Fiber> fibers(block.x);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(fibers);
    }
}

}  // namespace mlopt::emulation
