// Kernel launches. `<<< >>>` appears here alone, so that the same kernels also compile as host C++ under
// csrc/tests/cuda_emulation.h.
#pragma once

#include <cstdint>

#ifdef MLOPT_CUDA_EMULATION
#include "../tests/cuda_emulation.h"
#define MLOPT_UNROLL
#define MLOPT_UNROLL_BY(times)
#else
#include <cuda_runtime.h>
#define MLOPT_PRAGMA(text) _Pragma(#text)
#define MLOPT_UNROLL MLOPT_PRAGMA(unroll)
#define MLOPT_UNROLL_BY(times) MLOPT_PRAGMA(unroll times)
#define MLOPT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define MLOPT_LAUNCH(kernel, grid, block, stream, ...) MLOPT_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define MLOPT_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace mlopt {

constexpr int kThreads = 256;

// The error of the launches since the last call, as text, or nullptr.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Sum over the threads of a block, at most 1024 and whole warps, in a fixed order; every thread gets it. All threads
// must call it.
template <typename T>
__device__ T block_sum(T value) {
  constexpr int kWarpSize = 32;
  __shared__ T sums[1024 / kWarpSize];
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) sum += sums[warp];
  __syncthreads();  // the next call writes `sums`
  return sum;
}

}  // namespace mlopt
