// Kernel launches. MLOPT_LAUNCH is the only place where `<<< >>>` appears, so that the same kernels also compile as
// host C++ under csrc/tests/cuda_emulation.h.
#pragma once

#include <cstdint>

#ifdef MLOPT_CUDA_EMULATION
#include "../tests/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define MLOPT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace mlopt {

constexpr int kThreads = 256;

// The error of the launches since the last call, as text, or nullptr.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Sum over the threads of a block by a fixed tree; every thread gets it. All threads must call it.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T shared[kThreads];
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) shared[threadIdx.x] += shared[threadIdx.x + width];
    __syncthreads();
  }
  const T sum = shared[0];
  __syncthreads();  // the next call writes `shared`
  return sum;
}

}  // namespace mlopt
