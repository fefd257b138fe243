// Family `matmul`: products of two small matrices, for which general libraries take several times what the arithmetic
// does. CPU only. Torch-free.
//
// C = A B, or A B + bias in every row, by one thread. A and B have any strides, such as those of a transposed view.
// Each element of C is the bias, or zero, plus the products in the order of K, so nothing is skipped and the same
// operands give the same bits; strides do not change them. Right for every size; larger ones than the limits below are
// better left to a library, which uses more threads and blocks for caches.
#pragma once

#include <cstdint>

namespace mlopt {

constexpr int64_t kSmallMatmulDim = 1024;                   // the most for M, N and K, and
constexpr int64_t kSmallMatmulProducts = int64_t(1) << 20;  // for M * N * K

template <typename T>
struct SmallMatmul {
  const T* a;  // [M, K]
  int64_t a_row, a_column;
  const T* b;  // [K, N]
  int64_t b_row, b_column;
  const T* bias;  // [N], or nullptr
  int64_t bias_stride;
  T* c;  // [M, N], contiguous
  int64_t rows, columns, depth;
};

template <typename T>
void small_matmul_cpu(const SmallMatmul<T>& q);

// The same by one instruction set.
template <typename T>
struct SmallMatmulKernel {
  void (*multiply)(const SmallMatmul<T>& q);
  const char* name;
};

// All that this machine can run, the best first; for tests. Returns how many were written to `kernels` (at most 3).
template <typename T>
int small_matmul_kernels(SmallMatmulKernel<T>* kernels);

}  // namespace mlopt
