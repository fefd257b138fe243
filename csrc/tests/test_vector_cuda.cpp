// The CUDA kernels of the family `vector`, run under emulation, against the CPU kernels.
#define MLOPT_CUDA_EMULATION
#include "../vector/vector_cuda.cu"
#include "check.h"
#include "vector_cases.h"

namespace mlopt::testing {
namespace {

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;

template <typename T>
void check_close(const std::vector<T>& got, const std::vector<T>& expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(expected[i])) {
      CHECK(std::isnan(got[i]));
    } else {
      CHECK_NEAR(got[i], expected[i], kTolerance<T>);
    }
  }
}

template <typename T>
void test_dot(int64_t rows, int64_t n) {
  const auto a = random_vector<T>(rows * n, 4), b = random_vector<T>(rows * n, 5);
  std::vector<T> partials(rows * num_blocks(n)), expected(rows), got(rows, T(7)), again(rows, T(8));
  for (const bool root : {false, true}) {
    const T* second = root ? a.data() : b.data();
    dot_cpu<T>({a.data(), second, expected.data(), partials.data(), rows, n, root}, serial_for);
    CHECK(dot_cuda<T>({a.data(), second, got.data(), partials.data(), rows, n, root}, nullptr) == nullptr);
    dot_cuda<T>({a.data(), second, again.data(), partials.data(), rows, n, root}, nullptr);
    // Sums of n terms of either sign, taken in another order.
    for (int64_t row = 0; row < rows; ++row)
      CHECK_NEAR(got[row], expected[row], kTolerance<T> * (1 + std::sqrt(double(n)) / 50));
    CHECK(same_bits(got, again, 0, rows));
  }
}

template <typename T>
void test_cg_step(int64_t n) {
  CgCase<T> expected(n), got(n);
  for (int step = 0; step < 2; ++step) {
    cg_step_cpu(expected.params(), serial_for);
    CHECK(cg_step_cuda(got.params(), nullptr) == nullptr);
    check_close(got.x, expected.x);
    check_close(got.r, expected.r);
    check_close(got.p, expected.p);
    check_close(got.state, expected.state);
  }
}

template <typename T>
void test_elementwise(int64_t n) {
  auto v = random_vector<T>(n, 6), acc = random_vector<T>(n, 7);
  const auto av = random_vector<T>(n, 8);
  auto v2 = v, acc2 = acc;
  neumann_step_cpu<T>({v.data(), acc.data(), av.data(), T(0.3), n}, serial_for);
  neumann_step_cuda<T>({v2.data(), acc2.data(), av.data(), T(0.3), n}, nullptr);
  check_close(v2, v);
  check_close(acc2, acc);
  const T steps[2] = {T(0.5), T(-2)};
  const auto x = random_vector<T>(2 * n, 9), direction = random_vector<T>(2 * n, 10);
  std::vector<T> expected(2 * n), got(2 * n);
  perturb_cpu<T>({x.data(), direction.data(), steps, expected.data(), 2, n}, serial_for);
  perturb_cuda<T>({x.data(), direction.data(), steps, got.data(), 2, n}, nullptr);
  check_close(got, expected);
}

void test_parts() {
  for (const int64_t n :
       {int64_t(0), int64_t(1), kBlock, kBlock + 1, 792 * kBlock, 792 * kBlock + 1, int64_t(10000000)}) {
    const Parts parts(n);
    CHECK(parts.count >= 1 && parts.count <= num_blocks(n) && parts.count <= kMostParts && parts.size % kUnit == 0);
    CHECK(parts.count * parts.size >= n && (parts.count - 1) * parts.size <= n);
  }
}

template <typename T>
void run() {
  for (const int64_t n : kSizes) {
    for (const int64_t rows : {0, 1, 3}) test_dot<T>(rows, n);
    test_cg_step<T>(n);
    test_elementwise<T>(n);
  }
}

}  // namespace
}  // namespace mlopt::testing

int main() {
  mlopt::testing::test_parts();
  mlopt::testing::run<float>();
  mlopt::testing::run<double>();
  std::puts("vector, CUDA kernels under emulation: ok");
}
