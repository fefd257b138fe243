// The CPU kernels of the family `glm` against plain loops in double; every instruction set; serial and threaded.
#include "../glm/glm_tiles.h"
#include "check.h"
#include "glm_cases.h"
#include "thread_pool.h"

namespace mlopt::testing {
namespace {

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 5e-5 : 1e-12;

// out = X^T f(X V) + diagonal v for one task and right-hand side; returns the loss.
template <typename T>
double plain_product(const GlmCase<T>& c, GlmFunction function, int64_t task, int64_t k, std::vector<double>& out) {
  const auto& s = c.s;
  out.assign(s.classes * c.stride, 0);
  std::vector<double> u(s.classes), values(c.values.begin(), c.values.end()),
      weights(c.weights.begin(), c.weights.end()), scales(c.scales.begin(), c.scales.end());
  const T* v = c.v.data() + (task * s.rhs + k) * s.classes * c.stride;
  const auto x = [&](int64_t i, int64_t d) {
    return d < s.features ? double(c.x[(task * s.rows + i) * s.features + d]) : 1.0;
  };
  const GlmRows<double> rows{function, values.data(), weights.data(), c.labels.data(), false, scales.data()};
  double loss = 0;
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < s.classes; ++j) {
      u[j] = 0;
      for (int64_t d = 0; d < s.features + s.bias; ++d) u[j] += x(i, d) * double(v[j * c.stride + d]);
    }
    loss += glm_row<double>(rows, task * s.rows + i, s.classes, u.data(), nullptr);
    for (int64_t j = 0; j < s.classes; ++j)
      for (int64_t d = 0; d < s.features + s.bias; ++d) out[j * c.stride + d] += x(i, d) * u[j];
  }
  for (int64_t j = 0; j < s.classes * c.stride; ++j)
    out[j] += double(c.diagonal[task * s.classes * c.stride + j]) * double(v[j]);
  return loss;
}

template <typename T>
void test_product(const GlmShape& shape, int64_t chunk_rows) {
  for (const auto function : {kGlmIdentity, kGlmDiagonal, kGlmSoftmax, kGlmLogistic, kGlmSoftmaxIndex, kGlmSoftmaxDense,
                              kGlmRankOne, kGlmBlock, kGlmFitLinear, kGlmFitLogistic, kGlmFitSoftmax}) {
    if (glm_is_loss(function) && shape.rhs != 1) continue;
    GlmCase<T> serial(shape, chunk_rows), threaded(shape, chunk_rows);
    glm_product_cpu(serial.product(function), serial_for);
    glm_product_cpu(threaded.product(function), thread_pool);
    CHECK(same_bits(serial.out, threaded.out, 0, serial.size));
    std::vector<double> expected;
    const int64_t n = shape.classes * serial.stride;
    for (int64_t task = 0; task < shape.tasks; ++task)
      for (int64_t k = 0; k < shape.rhs; ++k) {
        const double loss = plain_product(serial, function, task, k, expected);
        for (int64_t j = 0; j < n; ++j)
          CHECK_NEAR(serial.out[(task * shape.rhs + k) * n + j], expected[j], kTolerance<T>);
        if (glm_is_loss(function)) CHECK_NEAR(serial.losses[task], loss, kTolerance<T>);
      }
  }
}

// X V to z, and X^T z.
template <typename T>
void test_halves(const GlmShape& shape, int64_t chunk_rows) {
  GlmCase<T> whole(shape, chunk_rows), halves(shape, chunk_rows);
  auto q = whole.product(kGlmIdentity);
  q.diagonal = nullptr;
  glm_product_cpu(q, serial_for);
  q = halves.product(kGlmIdentity);
  q.diagonal = nullptr;
  q.backward = false;
  glm_product_cpu(q, thread_pool);
  q.backward = true;
  q.forward = false;
  glm_product_cpu(q, thread_pool);
  CHECK(same_bits(whole.out, halves.out, 0, whole.size));
}

// Every instruction set of this machine, at every width and tail.
template <typename T>
void test_tiles() {
  GlmTiles<T> all[3];
  const int count = glm_all_tiles(all);
  CHECK(count >= 1);
  for (const int64_t features : {0, 1, 3, 4, 7, 8, 15, 16, 17, 63, 64, 65, 131})
    for (const int64_t columns : {1, 2, 5, 6, 7, 12, 13, 32})
      for (const int64_t rows : {1, 2, 3, 4, 5, 32}) {
        const int64_t stride = glm_stride(features, true);
        const auto x = random_vector<T>(rows * features, 1), v = random_vector<T>(columns * stride, 2);
        for (int k = 0; k < count; ++k) {
          std::vector<T> u(rows * columns), acc(columns * stride, T(1));
          all[k].forward(x.data(), rows, features, v.data(), columns, stride, u.data(), rows * features);
          all[k].backward(x.data(), rows, features, u.data(), columns, stride, acc.data(), rows * features);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < columns; ++c) {
              double sum = 0;
              for (int64_t d = 0; d < features; ++d) sum += double(x[i * features + d]) * double(v[c * stride + d]);
              CHECK_NEAR(u[i * columns + c], sum, kTolerance<T>);
            }
          for (int64_t c = 0; c < columns; ++c)
            for (int64_t d = 0; d < stride; ++d) {
              double sum = 1;
              for (int64_t i = 0; i < rows && d < features; ++i)
                sum += double(x[i * features + d]) * double(u[i * columns + c]);
              CHECK_NEAR(acc[c * stride + d], sum, kTolerance<T>);
            }
        }
      }
}

// A sum over blocks of rows, by every instruction set, against the plain one.
template <typename T>
void test_narrow_sums(const GlmShape& shape) {
  GlmCase<T> c(shape, 32);
  std::fill(c.diagonal.begin(), c.diagonal.end(), T(0));
  const int64_t blocks = glm_narrow_blocks(shape.rows), rows = kGlmNarrowRows;
  const auto blocked = [&](const std::vector<T>& from, int64_t width) {
    std::vector<T> to(blocks * width * rows, T(0));
    for (int64_t i = 0; i < shape.rows; ++i)
      for (int64_t j = 0; j < width; ++j) to[(i / rows * width + j) * rows + i % rows] = from[i * width + j];
    return to;
  };
  const auto x = blocked(c.x, shape.features), scales = blocked(c.scales, shape.classes),
             targets = blocked(c.values, shape.classes);
  GlmTiles<T> all[3];
  const int count = glm_all_tiles(all);
  for (const auto function : {kGlmFitLinear, kGlmFitLogistic, kGlmFitSoftmax})
    for (const T size : {T(1), T(300)})  // also where exponentials are 0 or overflow
      for (int k = 0; k < count; ++k) {
        GlmCase<T> big = c;
        for (auto& v : big.v) v *= size;
        std::vector<T> acc(glm_narrow_partial(shape.features, shape.classes), T(NAN)), out(big.size, T(NAN));
        all[k].narrow(
            {function, x.data(), scales.data(), targets.data(), shape.features, shape.classes, big.stride, shape.bias},
            0, blocks, big.v.data(), acc.data(), out.data());
        std::vector<double> expected;
        plain_product(big, function, 0, 0, expected);
        for (int64_t j = 0; j < big.size; ++j) CHECK_NEAR(out[j], expected[j], 10 * kTolerance<T>);
      }
}

// Descent over blocks against descent by sweeps; threads change no bit.
template <typename T>
void test_narrow(const GlmShape& shape) {
  for (const auto function : {kGlmFitLinear, kGlmFitLogistic, kGlmFitSoftmax})
    for (const bool moves : {false, true}) {
      GlmCase<T> c(shape, 64);
      std::vector<T> narrow(glm_narrow_size(shape.rows, shape.features, shape.classes) + 1), w, w2, w3, moving, moving2;
      auto by_sweeps = c.descent(function, w, moves ? &moving : nullptr, nullptr, nullptr);
      by_sweeps.product.diagonal = nullptr;
      glm_descent_cpu(by_sweeps, serial_for);
      glm_descent_cpu(c.descent(function, w2, moves ? &moving2 : nullptr, nullptr, narrow.data()), serial_for);
      for (int64_t j = 0; j < c.size; ++j) CHECK_NEAR(w2[j], w[j], kTolerance<T>);
      for (int64_t j = 0; moves && j < c.size; ++j) CHECK_NEAR(moving2[j], moving[j], kTolerance<T>);
      glm_descent_cpu(c.descent(function, w3, moves ? &moving : nullptr, nullptr, narrow.data()), thread_pool);
      CHECK(same_bits(w2, w3, 0, c.size));
    }
}

// Solves by every pool, checked by the true residual.
template <typename T>
void test_cg() {
  const GlmShape shape{3, 2, 50, 10, 3, true};
  GlmCase<T> serial(shape, 64), threaded(shape, 64);
  std::vector<T> q, q2;
  glm_cg_cpu(serial.cg(200, q), serial_for);
  glm_cg_cpu(threaded.cg(200, q2), thread_pool);
  CHECK(same_bits(q, q2, 0, serial.size));
  const std::vector<T> b = serial.v;
  serial.v = q;
  std::vector<double> hq;
  for (int64_t task = 0; task < shape.tasks; ++task)
    for (int64_t k = 0; k < shape.rhs; ++k) {
      plain_product(serial, kGlmDiagonal, task, k, hq);
      for (size_t j = 0; j < hq.size(); ++j) CHECK_NEAR(hq[j], b[(task * shape.rhs + k) * hq.size() + j], 1e-4);
    }
  for (int64_t row = 0; row < shape.tasks * shape.rhs; ++row)
    CHECK(serial.state[row * kNumColumns + kStatus] != T(kBreakdown) &&
          serial.state[row * kNumColumns + kNumSteps] > 0);
}

template <typename T>
void run() {
  test_tiles<T>();
  for (const auto& shape : kGlmShapes)
    for (const int64_t chunk_rows :
         {int64_t(32), glm_chunk_rows_cpu(shape.rows, shape.features, shape.rhs * shape.classes)}) {
      test_product<T>(shape, chunk_rows);
      test_halves<T>(shape, chunk_rows);
    }
  for (const GlmShape& shape : std::vector<GlmShape>{{1, 1, 0, 3, 2, true},
                                                     {1, 1, 1, 1, 1, false},
                                                     {1, 1, 63, 20, 1, true},
                                                     {1, 1, 64, 5, 3, false},
                                                     {1, 1, 130, 128, 10, true},
                                                     {1, 1, 3000, 33, 32, true}}) {
    test_narrow_sums<T>(shape);
    test_narrow<T>(shape);
  }
  test_cg<T>();
}

}  // namespace
}  // namespace mlopt::testing

int main() {
  mlopt::testing::run<float>();
  mlopt::testing::run<double>();
  std::puts("glm: ok");
}
