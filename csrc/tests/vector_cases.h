// Inputs and references for the tests of the family `vector`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../vector/vector.h"

namespace mlopt::testing {

// Sizes around every boundary of the kernels: lanes, threads, blocks.
inline const std::vector<int64_t> kSizes = {
    0, 1, 2, 31, 32, 33, 255, 256, 257, 999, kBlock - 1, kBlock, kBlock + 1, 2 * kBlock + 3, 50000};

template <typename T>
std::vector<T> random_vector(int64_t size, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> draw(-1, 1);
  std::vector<T> values(size);
  for (auto& v : values) v = static_cast<T>(draw(engine));
  return values;
}

// Whether two ranges hold the same bits (NaN equals itself).
template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b, int64_t begin, int64_t end) {
  return begin == end || std::memcmp(a.data() + begin, b.data() + begin, (end - begin) * sizeof(T)) == 0;
}

// A batch of solves in mid-flight: row 0 runs, row 1 has converged, row 2 meets negative curvature, row 3 a NaN.
template <typename T>
struct CgCase {
  static constexpr int64_t kRows = 4;
  int64_t n;
  std::vector<T> x, r, p, ap, state, pap_partials, rr_partials;

  explicit CgCase(int64_t size)
      : n(size),
        x(random_vector<T>(kRows * size, 1)),
        r(random_vector<T>(kRows * size, 2)),
        p(random_vector<T>(kRows * size, 3)),
        ap(kRows * size),
        state(kRows * kNumColumns),
        pap_partials(kRows * num_blocks(size)),
        rr_partials(kRows * num_blocks(size)) {
    for (int64_t row = 0; row < kRows; ++row) {
      double rr = 0;
      for (int64_t i = row * n; i < (row + 1) * n; ++i) {
        ap[i] = p[i] * T(row == 2 ? -2 : 2) + T(0.01) * r[i] * (row == 2 ? T(0) : T(1));
        rr += double(r[i]) * r[i];
      }
      if (row == 3 && n > 0) ap[row * n + n / 2] = T(NAN);
      T* columns = state.data() + row * kNumColumns;
      columns[kRR] = static_cast<T>(rr);
      columns[kTolerance2] = T(1e-12);
      columns[kStatus] = T(row == 1 ? kConverged : kRunning);
    }
  }

  CgParams<T> params() {
    return {x.data(), r.data(), p.data(), ap.data(), state.data(), pap_partials.data(), rr_partials.data(), kRows, n};
  }
};

}  // namespace mlopt::testing
