#include <cuda_runtime.h>

#include "device.h"

namespace mlopt {

DeviceGuard::DeviceGuard(int device) {
  cudaError_t error = cudaGetDevice(&previous_);
  if (error == cudaSuccess && previous_ != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) error_ = cudaGetErrorString(error);
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace mlopt
