// The instruction sets of the family `matmul`.
#include <cstring>
#include <type_traits>

#include "../common/lanes.h"
#include "matmul.h"

namespace mlopt {
namespace {

namespace portable {
#define MLOPT_TARGET
constexpr int kTileRows = 6, kTileVectors = 2;
using lanes::portable::Lanes;
#include "matmul_loops.h"
#undef MLOPT_TARGET
}  // namespace portable

#ifdef MLOPT_X86
namespace avx2 {
#define MLOPT_TARGET MLOPT_TARGET_AVX2
constexpr int kTileRows = 6, kTileVectors = 2;
using lanes::avx2::Lanes;
#include "matmul_loops.h"
#undef MLOPT_TARGET
}  // namespace avx2

namespace avx512 {
#define MLOPT_TARGET MLOPT_TARGET_AVX512
constexpr int kTileRows = 6, kTileVectors = 4;
using lanes::avx512::Lanes;
#include "matmul_loops.h"
#undef MLOPT_TARGET
}  // namespace avx512
#endif

}  // namespace

template <typename T>
int small_matmul_kernels(SmallMatmulKernel<T>* kernels) {
  int count = 0;
#ifdef MLOPT_X86
  if (lanes::avx512::is_supported()) kernels[count++] = {avx512::multiply<T>, "avx512"};
  if (lanes::avx2::is_supported()) kernels[count++] = {avx2::multiply<T>, "avx2"};
#endif
  kernels[count++] = {portable::multiply<T>, "portable"};
  return count;
}

template <typename T>
void small_matmul_cpu(const SmallMatmul<T>& q) {
  static const SmallMatmulKernel<T> best = [] {
    SmallMatmulKernel<T> kernels[3];
    small_matmul_kernels(kernels);
    return kernels[0];
  }();
  best.multiply(q);
}

template int small_matmul_kernels<float>(SmallMatmulKernel<float>*);
template int small_matmul_kernels<double>(SmallMatmulKernel<double>*);
template void small_matmul_cpu<float>(const SmallMatmul<float>&);
template void small_matmul_cpu<double>(const SmallMatmul<double>&);

}  // namespace mlopt
