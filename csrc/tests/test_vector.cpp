// The CPU kernels of the family `vector` against plain loops, serial and threaded.
#include "check.h"
#include "thread_pool.h"
#include "vector_cases.h"

namespace mlopt::testing {
namespace {

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 1e-14;

template <typename T>
void test_dot(int64_t rows, int64_t n) {
  const auto a = random_vector<T>(rows * n, 4), b = random_vector<T>(rows * n, 5);
  std::vector<T> partials(rows * num_blocks(n)), serial(rows, T(7)), threaded(rows, T(7)), root(rows);
  dot_cpu<T>({a.data(), b.data(), serial.data(), partials.data(), rows, n, false}, serial_for);
  dot_cpu<T>({a.data(), b.data(), threaded.data(), partials.data(), rows, n, false}, thread_pool);
  dot_cpu<T>({a.data(), a.data(), root.data(), partials.data(), rows, n, true}, serial_for);
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0, squares = 0, scale = 0;
    for (int64_t i = row * n; i < (row + 1) * n; ++i) {
      sum += double(a[i]) * b[i];
      squares += double(a[i]) * a[i];
      scale += std::fabs(double(a[i]) * b[i]);
    }
    CHECK(std::fabs(serial[row] - sum) <= kTolerance<T> * (scale + 1e-30));
    CHECK_NEAR(root[row], std::sqrt(squares), kTolerance<T>);
  }
  CHECK(same_bits(serial, threaded, 0, rows));
}

template <typename T>
void test_cg_step(int64_t n) {
  const CgCase<T> start(n);
  CgCase<T> serial(n), threaded(n);
  cg_step_cpu(serial.params(), serial_for);
  cg_step_cpu(threaded.params(), thread_pool);
  CHECK(serial.x == threaded.x && serial.r == threaded.r && serial.p == threaded.p);
  if (n == 0) return;
  // Rows that do not step keep every bit.
  CHECK(same_bits(serial.x, start.x, n, 4 * n) && same_bits(serial.r, start.r, n, 4 * n));
  CHECK(same_bits(serial.p, start.p, n, 4 * n));
  const auto status = [&](int row) { return serial.state[row * kNumColumns + kStatus]; };
  CHECK(status(1) == T(kConverged) && status(2) == T(kBreakdown) && status(3) == T(kNonFinite));
  CHECK(serial.state[1 * kNumColumns + kNumSteps] == 0 && serial.state[0 * kNumColumns + kNumSteps] == 1);
  double pap = 0, rr = 0;
  for (int64_t i = 0; i < n; ++i) pap += double(start.p[i]) * start.ap[i];
  if (pap <= 0) return;  // the smallest sizes may draw negative curvature
  const double alpha = start.state[kRR] / pap;
  for (int64_t i = 0; i < n; ++i) {
    const double r = start.r[i] - alpha * start.ap[i];
    CHECK_NEAR(serial.x[i], start.x[i] + alpha * start.p[i], 20 * kTolerance<T>);
    CHECK_NEAR(serial.r[i], r, 20 * kTolerance<T>);
    rr += r * r;
  }
  for (int64_t i = 0; i < n; ++i)
    CHECK_NEAR(serial.p[i], serial.r[i] + rr / start.state[kRR] * start.p[i], 100 * kTolerance<T>);
  CHECK_NEAR(serial.state[kRR], rr, 100 * kTolerance<T>);
}

template <typename T>
void test_elementwise(int64_t n) {
  const auto v0 = random_vector<T>(n, 6), acc0 = random_vector<T>(n, 7), av = random_vector<T>(n, 8);
  auto v = v0, acc = acc0;
  neumann_step_cpu<T>({v.data(), acc.data(), av.data(), T(0.3), n}, thread_pool);
  const T steps[2] = {T(0.5), T(-2)};
  const auto x = random_vector<T>(2 * n, 9), direction = random_vector<T>(2 * n, 10);
  std::vector<T> out(2 * n);
  perturb_cpu<T>({x.data(), direction.data(), steps, out.data(), 2, n}, thread_pool);
  for (int64_t i = 0; i < n; ++i) {
    CHECK(v[i] == v0[i] - T(0.3) * av[i] && acc[i] == acc0[i] + v[i]);
    for (int64_t row = 0; row < 2; ++row)
      CHECK(out[row * n + i] == x[row * n + i] + steps[row] * direction[row * n + i]);
  }
}

template <typename T>
void run() {
  for (const int64_t n : kSizes) {
    for (const int64_t rows : {0, 1, 3}) test_dot<T>(rows, n);
    test_cg_step<T>(n);
    test_elementwise<T>(n);
  }
  test_dot<T>(1, 40 * kBlock + 1);  // enough blocks for several threads
  test_cg_step<T>(40 * kBlock + 1);
}

}  // namespace
}  // namespace mlopt::testing

int main() {
  mlopt::testing::run<float>();
  mlopt::testing::run<double>();
  std::puts("vector: ok");
}
