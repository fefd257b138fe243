// The family `matmul` against plain loops in double: every instruction set, at every tail, with all kinds of strides.
#include "../matmul/matmul.h"
#include "check.h"
#include "vector_cases.h"

namespace mlopt::testing {
namespace {

// A matrix of its own size in memory, as the kernel reads it: rows in order, columns in order, part of a larger one,
// or one row for all.
enum class Layout { kRows, kColumns, kPart, kExpanded };

template <typename T>
struct Matrix {
  std::vector<T> memory;
  int64_t row, column;

  Matrix(int64_t rows, int64_t columns, Layout layout, unsigned seed) {
    if (layout == Layout::kRows) row = columns, column = 1;
    if (layout == Layout::kColumns) row = 1, column = rows;
    if (layout == Layout::kPart) row = 2 * columns + 3, column = 2;
    if (layout == Layout::kExpanded) row = 0, column = 1;
    // No more than what is read, so that a sanitizer finds what is read beyond.
    const int64_t size = rows * columns == 0 ? 0 : (rows - 1) * row + (columns - 1) * column + 1;
    memory = random_vector<T>(size, seed);
  }

  double at(int64_t i, int64_t j) const { return memory[i * row + j * column]; }
};

template <typename T>
void test_product(int64_t m, int64_t n, int64_t k, Layout a_layout, Layout b_layout, int64_t bias_stride) {
  const Matrix<T> a(m, k, a_layout, 1), b(k, n, b_layout, 2);
  const bool has_bias = bias_stride >= 0;
  const auto bias = random_vector<T>(has_bias && n > 0 ? (n - 1) * bias_stride + 1 : 0, 3);
  SmallMatmulKernel<T> kernels[3];
  const int count = small_matmul_kernels(kernels);
  CHECK(count >= 1);
  for (int which = 0; which < count; ++which) {
    std::vector<T> c(m * n, T(NAN)), again(m * n, T(7));
    SmallMatmul<T> q{a.memory.data(),
                     a.row,
                     a.column,
                     b.memory.data(),
                     b.row,
                     b.column,
                     has_bias ? bias.data() : nullptr,
                     bias_stride,
                     c.data(),
                     m,
                     n,
                     k};
    kernels[which].multiply(q);
    q.c = again.data();
    kernels[which].multiply(q);
    CHECK(same_bits(c, again, 0, m * n));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = has_bias ? bias[j * bias_stride] : 0, scale = std::fabs(sum);
        for (int64_t d = 0; d < k; ++d) {
          sum += a.at(i, d) * b.at(d, j);
          scale += std::fabs(a.at(i, d) * b.at(d, j));
        }
        const double tolerance = (sizeof(T) == 4 ? 1e-6 : 2e-15) * (1 + 0.1 * double(k));
        CHECK(std::fabs(c[i * n + j] - sum) <= tolerance * scale);
      }
  }
}

template <typename T>
void test_sizes() {
  // Tails of tiles, vectors and strips of every instruction set.
  for (const int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 19, 64})
    for (const int64_t n : {0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 47, 64, 65, 79})
      for (const int64_t k : {0, 1, 2, 3, 4, 5, 8, 10, 33}) {
        const auto last = n % 2 == 0 ? Layout::kColumns : Layout::kPart;
        test_product<T>(m, n, k, Layout::kRows, Layout::kRows, -1);
        test_product<T>(m, n, k, Layout::kColumns, last, 1);
      }
}

template <typename T>
void test_layouts() {
  const Layout all[] = {Layout::kRows, Layout::kColumns, Layout::kPart, Layout::kExpanded};
  for (const Layout a : all)
    for (const Layout b : all)
      for (const int64_t bias_stride : {-1, 0, 1, 3})
        for (const int64_t m : {5, 13})
          for (const int64_t n : {16, 21}) test_product<T>(m, n, 18, a, b, bias_stride);
}

// Larger than the family is for; 256 is where the sum over the depth is interrupted.
template <typename T>
void test_large() {
  for (const int64_t k : {255, 256, 257, 600})
    for (const int64_t n : {3, 10, 35}) test_product<T>(20, n, k, Layout::kColumns, Layout::kColumns, 1);
  test_product<T>(300, 270, 5, Layout::kRows, Layout::kRows, -1);
}

// Zeros are not skipped, and what is not a number stays where it belongs.
template <typename T>
void test_not_finite() {
  const int64_t m = 8, n = 11, k = 5;
  SmallMatmulKernel<T> kernels[3];
  const int count = small_matmul_kernels(kernels);
  for (int which = 0; which < count; ++which)
    for (const T bad : {T(NAN), T(INFINITY)}) {
      std::vector<T> a(m * k, T(0)), b(k * n, T(1)), c(m * n);
      a[3 * k + 2] = bad;
      kernels[which].multiply({a.data(), k, 1, b.data(), n, 1, nullptr, 0, c.data(), m, n, k});
      for (int64_t i = 0; i < m * n; ++i) CHECK(i / n == 3 ? !std::isfinite(c[i]) : c[i] == 0);
      std::fill(a.begin(), a.end(), T(0));
      b[4 * n + 9] = bad;
      kernels[which].multiply({a.data(), k, 1, b.data(), n, 1, nullptr, 0, c.data(), m, n, k});
      for (int64_t i = 0; i < m * n; ++i) CHECK(i % n == 9 ? std::isnan(c[i]) : c[i] == 0);
    }
}

template <typename T>
void run() {
  test_sizes<T>();
  test_layouts<T>();
  test_large<T>();
  test_not_finite<T>();
}

}  // namespace
}  // namespace mlopt::testing

int main() {
  mlopt::testing::run<float>();
  mlopt::testing::run<double>();
  std::puts("matmul: ok");
}
