// Instructions that C++ has no words for: the products of tensor cores, and copies into shared memory that go on while
// the threads do something else. From sm_80 on; csrc/tests/cuda_emulation.h has the same for the host.
#pragma once

#include <cstring>

#include "half.h"
#include "launch.cuh"

namespace mlopt {

#ifdef MLOPT_CUDA_EMULATION
using emulation::commit_copies;
using emulation::mma_tf32;
using emulation::wait_copies;

inline void meet_block() { __syncthreads(); }
inline void copy_async16(void* shared, const void* global, int bytes) {
  emulation::copy_async({shared, global, 16, bytes});
}
inline void copy_async4(void* shared, const void* global, int bytes) {
  emulation::copy_async({shared, global, 4, bytes});
}
#else
// d += a b for a of 16 x 8 and b of 8 x 8, spread over the lanes of a warp. With g = lane / 4 and t = lane % 4: a is
// (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b is (t, g), (t + 4, g); d is (g, 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1). The last 13 bits of every operand are ignored.
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A barrier of the block to which its warps may come from different places of the code.
__device__ inline void meet_block() { asm volatile("bar.sync 0;" ::: "memory"); }

// Copy 16 or 4 bytes, the ones after the first `bytes` being zeros. Both addresses have to be multiples of the size.
__device__ inline void copy_async16(void* shared, const void* global, int bytes) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void copy_async4(void* shared, const void* global, int bytes) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// The copies that a thread has asked for since its last commit are one group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most kPending of the thread's groups are on their way.
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

// A number as the sum of two that tensor cores read whole: the nearest with 10 bits after the point, and what is left
// (of which they read 10 bits, too). Products of pairs, all but that of the two small parts, are those of floats up to
// about their rounding. Infinity becomes NaN.
struct Split {
  uint32_t large, small;
};
__device__ inline Split split(float value) {
  const uint32_t large = (bits_of_float(value) + 0x1000u) & 0xffffe000u;
  return {large, bits_of_float(value - float_of_bits(large))};
}

}  // namespace mlopt
