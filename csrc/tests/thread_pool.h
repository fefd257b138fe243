// A pool of four threads for kernels under test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace mlopt::testing {

inline void thread_pool(int64_t size, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t parts = std::min<int64_t>(4, size / std::max<int64_t>(grain, 1) + 1);
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < parts; ++k)
    threads.emplace_back([=] { body(context, size * k / parts, size * (k + 1) / parts); });
  for (auto& t : threads) t.join();
}

}  // namespace mlopt::testing
