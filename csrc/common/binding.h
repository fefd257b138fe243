// What every family's _op.cpp needs between tensors and kernels: dtype dispatch, torch's thread pool, device and
// stream.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "device.h"

namespace mlopt {

template <typename Body>
void with_dtype(const char* op, const at::Tensor& x, Body&& body) {
  if (x.scalar_type() == at::kFloat) return body(float{});
  if (x.scalar_type() == at::kDouble) return body(double{});
  TORCH_CHECK(false, op, ": expected float32 or float64, got ", x.scalar_type());
}

inline void torch_pool(int64_t size, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Runs the CPU or the CUDA kernel of one family function on where the tensors are.
template <typename Params, typename Cpu, typename Cuda>
void run(const char* op, const at::Tensor& where, const Params& params, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (where.is_cpu()) return cpu(params, torch_pool);
#ifdef MLOPT_WITH_CUDA
  const int device = where.device().index();
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
              op, ": this torch has no CUDA streams");
  const DeviceGuard guard(device);
  const char* error = guard.error() != nullptr ? guard.error() : cuda(params, stream);
  TORCH_CHECK(error == nullptr, op, ": CUDA error: ", error);
#endif
}

#ifdef MLOPT_WITH_CUDA
#define MLOPT_CUDA(function) function
#else
#define MLOPT_CUDA(function) nullptr
#endif

}  // namespace mlopt
