// The emulation must notice barriers that a real GPU would hang or misbehave at. Run with the name of a broken kernel;
// CTest expects every one of them to fail, and the right one to pass.
#include <cstring>

#include "cuda_emulation.h"

namespace {

int sums[4];

__global__ void right() {
  __shared__ int shared[8];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0)
    for (const int value : shared) sums[blockIdx.x] += value;
}

__global__ void waits_at_different_barriers() {
  if (threadIdx.x < 4) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void ends_while_others_wait() {
  if (threadIdx.x < 4) return;
  __syncthreads();
}

}  // namespace

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "";
  if (std::strcmp(name, "different") == 0) MLOPT_LAUNCH(waits_at_different_barriers, dim3(1), dim3(8), nullptr);
  if (std::strcmp(name, "ends") == 0) MLOPT_LAUNCH(ends_while_others_wait, dim3(1), dim3(8), nullptr);
  if (std::strcmp(name, "right") == 0) MLOPT_LAUNCH(right, dim3(4), dim3(8), nullptr);
  if (std::strcmp(name, "right") == 0)
    for (const int sum : sums)
      if (sum != 28) return 1;
  return 0;
}
