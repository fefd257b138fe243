// The CUDA kernels of the family `glm`, run under emulation, against the CPU kernels.
#define MLOPT_CUDA_EMULATION
#include <array>

#include "../glm/glm_cuda.cu"
#include "../glm/glm_tensor.cu"
#include "../vector/vector_cuda.cu"
#include "check.h"
#include "glm_cases.h"

namespace mlopt::testing {
namespace {

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-4 : 1e-12;

template <typename T>
void check_close(const std::vector<T>& got, const std::vector<T>& expected) {
  for (size_t i = 0; i < got.size(); ++i) CHECK_NEAR(got[i], expected[i], kTolerance<T>);
}

template <typename T>
void test_product(const GlmShape& shape, int64_t chunk_rows) {
  for (const auto function : {kGlmDiagonal, kGlmSoftmax, kGlmLogistic, kGlmSoftmaxIndex, kGlmSoftmaxDense}) {
    if (glm_is_loss(function) && shape.rhs != 1) continue;
    if (function != kGlmSoftmax && shape.rows > 32) continue;  // fibers are slow
    GlmCase<T> expected(shape, chunk_rows), got(shape, chunk_rows);
    glm_product_cpu(expected.product(function), serial_for);
    CHECK(glm_product_cuda(got.product(function), nullptr) == nullptr);
    check_close(got.out, expected.out);
    check_close(got.z, expected.z);
    if (glm_is_loss(function)) check_close(got.losses, expected.losses);
  }
  for (const bool forward : {true, false}) {
    GlmCase<T> expected(shape, chunk_rows), got(shape, chunk_rows);
    auto q = expected.product(kGlmIdentity), r = got.product(kGlmIdentity);
    q.forward = r.forward = forward;
    q.backward = r.backward = !forward;
    q.diagonal = r.diagonal = nullptr;
    glm_product_cpu(q, serial_for);
    glm_product_cuda(r, nullptr);
    check_close(got.z, expected.z);
    check_close(got.out, expected.out);
  }
}

// Products with an X of halves are those with the floats that they stand for.
template <typename Stored>
void test_halves(GlmStorage storage, int64_t features) {
  const GlmShape shape{2, 2, 40, features, 3, true};
  GlmCase<float> expected(shape, 32), got(shape, 32);
  std::vector<Stored> halves(expected.x.size());
  for (size_t k = 0; k < halves.size(); ++k) {
    halves[k].bits = static_cast<uint16_t>(k * 2477 % 0x3c01 | (k % 2 << 15));  // up to 1, and subnormal ones
    expected.x[k] = widened(halves[k]);
  }
  auto wide = expected.product(kGlmSoftmax), narrow = got.product(kGlmSoftmax);
  narrow.x = halves.data();
  narrow.storage = storage;
  CHECK(glm_product_cuda(wide, nullptr) == nullptr && glm_product_cuda(narrow, nullptr) == nullptr);
  check_close(got.out, expected.out);
  halves[0].bits = 0x7fc1;  // not a number in either type
  CHECK(glm_product_cuda(narrow, nullptr) == nullptr);
  for (int64_t d = 0; d < features; ++d) CHECK(std::isnan(got.out[d]));
}

// The sweep on tensor cores: every count of steps per warp, rows of X that are copied by 4 and by 16 bytes, tiles and
// chunks that are not full, several tasks and passes over right-hand sides.
void test_tensor_cores() {
  const GlmShape shapes[] = {{1, 1, 5, 64, 16, false},   {2, 5, 20, 70, 7, true},    {1, 1, 0, 72, 3, true},
                             {1, 1, 100, 356, 10, true}, {1, 1, 37, 784, 10, false}, {1, 1, 9, 1060, 3, true},
                             {1, 1, 17, 1408, 1, false}};
  for (const auto& shape : shapes) {
    CHECK(glm_fits_tensor_cores(shape.features, shape.classes));
    test_product<float>(shape, 32);
    for (const auto function : {kGlmRankOne, kGlmBlock, kGlmFitLogistic, kGlmFitSoftmax}) {
      if (shape.rows > 20 || shape.features > 100) continue;  // fibers are slow
      GlmCase<float> expected(shape, 8), got(shape, 8);
      glm_product_cpu(expected.product(function), serial_for);
      CHECK(glm_product_cuda(got.product(function), nullptr) == nullptr);
      check_close(got.out, expected.out);
    }
  }
  test_product<float>({1, 2, 150, 68, 4, true}, 128);  // more tiles than have a place at a time
  for (const auto [tasks, rows, rhs] : {std::array<int64_t, 3>{1, 20000, 1}, {32, 25, 1}, {1, 7, 4}, {1, 0, 1}}) {
    const int64_t chunk = glm_chunk_rows_cuda(tasks, rows, 784, 10, rhs, false);
    CHECK(chunk % 8 == 0 && chunk >= 20 * rhs && glm_num_chunks(rows, chunk) <= 3);  // the stand-in has three
  }
}

void test_widening() {
  const auto f16 = [](uint16_t bits) { return widened(Float16{bits}); };
  CHECK(f16(0x3c00) == 1.0f && f16(0xc000) == -2.0f && f16(0x7bff) == 65504.0f && f16(0x3555) == 0.333251953125f);
  CHECK(f16(0x0001) == 0x1p-24f && f16(0x83ff) == -0x3ffp-24f && f16(0x8000) == 0.0f && std::signbit(f16(0x8000)));
  CHECK(f16(0xfc00) == -INFINITY && std::isnan(f16(0x7e01)));
  const auto bf16 = [](uint16_t bits) { return widened(BFloat16{bits}); };
  CHECK(bf16(0x3f80) == 1.0f && bf16(0xc049) == -3.140625f && bf16(0x7f80) == INFINITY && std::isnan(bf16(0x7fc1)));
}

template <typename T>
void test_loops() {
  const GlmShape several{2, 2, 40, 9, 3, true}, one{2, 1, 40, 9, 3, true};
  GlmCase<T> expected(several, 32), got(several, 32);
  std::vector<T> q, q2;
  glm_cg_cpu(expected.cg(4, q), serial_for);
  CHECK(glm_cg_cuda(got.cg(4, q2), nullptr) == nullptr);
  check_close(q2, q);
  check_close(got.state, expected.state);

  auto term = expected.v, term2 = term, acc = term, acc2 = term;
  auto product = expected.product(kGlmSoftmax), product2 = got.product(kGlmSoftmax);
  product.v = term.data();
  product2.v = term2.data();
  glm_neumann_cpu<T>({product, term.data(), acc.data(), T(0.1), 4}, serial_for);
  CHECK(glm_neumann_cuda<T>({product2, term2.data(), acc2.data(), T(0.1), 4}, nullptr) == nullptr);
  check_close(acc2, acc);
  check_close(term2, term);

  for (const auto function : {kGlmSoftmaxIndex, kGlmFitLogistic, kGlmFitSoftmax}) {
    GlmCase<T> a(one, 32), b(one, 32);
    std::vector<T> w, w2, velocity, velocity2, losses(3 * one.tasks), losses2(3 * one.tasks);
    T* const no_loss = nullptr;
    const bool is_loss = glm_is_loss(function), moves = function != kGlmFitLogistic;
    glm_descent_cpu(a.descent(function, w, moves ? &velocity : nullptr, is_loss ? losses.data() : no_loss, nullptr),
                    serial_for);
    CHECK(glm_descent_cuda(
              b.descent(function, w2, moves ? &velocity2 : nullptr, is_loss ? losses2.data() : no_loss, nullptr),
              nullptr) == nullptr);
    check_close(w2, w);
    check_close(velocity2, velocity);
    check_close(losses2, losses);
  }
}

template <typename T>
void run() {
  for (const auto& shape : kGlmShapes) {
    if (shape.rows <= 100) test_product<T>(shape, 32);
  }
  test_loops<T>();
}

}  // namespace
}  // namespace mlopt::testing

int main() {
  mlopt::testing::run<float>();
  mlopt::testing::run<double>();
  for (const bool other : {false, true}) {
    mlopt::emulation::schedule = {other, other};
    mlopt::testing::test_tensor_cores();
  }
  mlopt::emulation::schedule = {};
  mlopt::testing::test_widening();
  for (const int64_t features : {9, 65, 66, 72}) {  // of those on tensor cores some are too odd for halves
    mlopt::testing::test_halves<mlopt::Float16>(mlopt::kGlmFloat16, features);
    mlopt::testing::test_halves<mlopt::BFloat16>(mlopt::kGlmBFloat16, features);
  }
  std::puts("glm, CUDA kernels under emulation: ok");
}
