// Parallel loops for kernels that know no thread pool: the caller hands one in.
//
// The binding passes torch's pool, so that no second OpenMP runtime is loaded beside torch's; C++ tests pass their own.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mlopt {

// Runs body(context, begin, end) over a partition of [0, size), possibly concurrently. `grain` is the least number of
// items worth a thread.
using ParallelFor = void (*)(int64_t size, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

template <typename Body>
void parallel_for(ParallelFor pool, int64_t size, int64_t grain, Body&& body) {
  using Callable = std::remove_reference_t<Body>;
  pool(
      size, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Callable*>(context))(begin, end); },
      &body);
}

inline void serial_for(int64_t size, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  if (size > 0) body(context, 0, size);
}

}  // namespace mlopt
