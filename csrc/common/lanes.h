// Vectors of the CPU's instruction sets under one name: Lanes<T> in namespaces portable, avx2 and avx512.
//
// The loops of a family are written once, in a header without include guard that is included in one namespace per
// instruction set. Each of them defines MLOPT_TARGET and what of Lanes is used, see glm/glm_tiles.cpp. Lanes use fused
// multiply-adds where the instruction set has them: results differ between instruction sets in the last bits, never
// between two runs on one machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define MLOPT_X86
#include <immintrin.h>
#endif

namespace mlopt::lanes {

namespace portable {
template <typename T>
struct Lanes {
  typedef T Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(T);
  static Reg load(const T* p) {
    Reg r;
    std::memcpy(&r, p, sizeof(r));
    return r;
  }
  static Reg load_part(const T* p, int64_t count) {
    Reg r = {};
    for (int64_t k = 0; k < count; ++k) r[k] = p[k];
    return r;
  }
  static Reg set(T value) { return value - Reg{}; }
  static void store(T* p, Reg r) { std::memcpy(p, &r, sizeof(r)); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static T sum(Reg r) {
    T total = 0;
    for (int k = 0; k < kLanes; ++k) total += r[k];
    return total;
  }
};
}  // namespace portable

#ifdef MLOPT_X86
#define MLOPT_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define MLOPT_TARGET_AVX512 __attribute__((target("avx512f")))

namespace avx2 {
#define MLOPT_INLINE __attribute__((target("avx2,fma"), always_inline)) static inline

inline bool is_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

alignas(32) inline constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  MLOPT_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  MLOPT_INLINE Reg load_part(const float* p, int64_t count) {
    return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - count)));
  }
  MLOPT_INLINE Reg set(float value) { return _mm256_set1_ps(value); }
  MLOPT_INLINE void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  MLOPT_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  MLOPT_INLINE float sum(Reg r) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};
template <>
struct Lanes<double> {
  using Reg = __m256d;
  static constexpr int kLanes = 4;
  MLOPT_INLINE Reg load(const double* p) { return _mm256_loadu_pd(p); }
  MLOPT_INLINE Reg load_part(const double* p, int64_t count) {
    return _mm256_maskload_pd(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - 2 * count)));
  }
  MLOPT_INLINE Reg set(double value) { return _mm256_set1_pd(value); }
  MLOPT_INLINE void store(double* p, Reg r) { _mm256_storeu_pd(p, r); }
  MLOPT_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  MLOPT_INLINE double sum(Reg r) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};
#undef MLOPT_INLINE
}  // namespace avx2

namespace avx512 {
#define MLOPT_INLINE __attribute__((target("avx512f"), always_inline)) static inline

inline bool is_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f");
}

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  MLOPT_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  MLOPT_INLINE Reg load_part(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
  MLOPT_INLINE Reg set(float value) { return _mm512_set1_ps(value); }
  MLOPT_INLINE void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  MLOPT_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // By halves. (GCC 12 warns of uninitialized values inside its own _mm512_reduce_add_ps.)
  MLOPT_INLINE float sum(Reg r) {
    const auto half = __builtin_shufflevector(r, r, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(r, r, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto quarter =
        __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  }
};
template <>
struct Lanes<double> {
  using Reg = __m512d;
  static constexpr int kLanes = 8;
  MLOPT_INLINE Reg load(const double* p) { return _mm512_loadu_pd(p); }
  MLOPT_INLINE Reg load_part(const double* p, int64_t count) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  }
  MLOPT_INLINE Reg set(double value) { return _mm512_set1_pd(value); }
  MLOPT_INLINE void store(double* p, Reg r) { _mm512_storeu_pd(p, r); }
  MLOPT_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  MLOPT_INLINE double sum(Reg r) {
    const auto half = __builtin_shufflevector(r, r, 0, 1, 2, 3) + __builtin_shufflevector(r, r, 4, 5, 6, 7);
    return (half[0] + half[2]) + (half[1] + half[3]);
  }
};
#undef MLOPT_INLINE
}  // namespace avx512
#endif

}  // namespace mlopt::lanes
