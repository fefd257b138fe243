// The loops of glm_narrow.h for one instruction set. No include guard, see glm_tile_loops.h.

template <typename T>
using Reg = typename Lanes<T>::Reg;

// exp(x) for x <= 0, to an ulp or two: x = n ln 2 + r, and the Taylor polynomial of exp(r), |r| <= ln 2 / 2. NaN stays
// NaN.
template <typename T>
MLOPT_TARGET inline Reg<T> exp_of_negative(Reg<T> x) {
  using L = Lanes<T>;
  using Bits = decltype(x < x);  // integers as wide as T
  constexpr bool kSingle = sizeof(T) == 4;
  constexpr int kDegree = kSingle ? 7 : 13, kMantissa = kSingle ? 23 : 52;
  const T round = kSingle ? T(12582912) : T(6755399441055744);  // 1.5 * 2^kMantissa: adding it leaves an integer
  const Reg<T> lowest = L::set(kSingle ? T(-86) : T(-707));     // its exponential is 0 beside 1, and not denormal
  x = x < lowest ? lowest : x;
  const Reg<T> shifted = L::fma(x, L::set(T(1.44269504088896340736)), L::set(round)), n = shifted - L::set(round);
  Reg<T> r = L::fma(n, L::set(T(-0.693145751953125)), x);  // ln 2 in two parts, the first exact
  r = L::fma(n, L::set(T(-1.42860682030941723212e-6)), r);
  T factorial = 1;
  for (int k = 2; k <= kDegree; ++k) factorial *= T(k);
  Reg<T> p = L::set(T(1) / factorial);
#pragma GCC unroll 16
  for (int k = kDegree; k > 0; --k) {
    factorial /= T(k);
    p = L::fma(p, r, L::set(T(1) / factorial));
  }
  const Bits one = (Bits)L::set(T(1));
  return p * (Reg<T>)(one + ((Bits)shifted << kMantissa));  // times 2^n
}

// u <- scales * mean(u) - targets, for all classes of one vector of rows.
template <typename T>
MLOPT_TARGET inline void narrow_fit(GlmFunction function, const T* scales, const T* targets, int64_t classes, T* u) {
  using L = Lanes<T>;
  Reg<T> largest = L::load(u), total = L::set(0);
  if (function == kGlmFitSoftmax) {
    for (int64_t c = 1; c < classes; ++c) {
      const Reg<T> z = L::load(u + c * kGlmNarrowRows);
      largest = z > largest ? z : largest;
    }
    for (int64_t c = 0; c < classes; ++c) {
      const Reg<T> e = exp_of_negative<T>(L::load(u + c * kGlmNarrowRows) - largest);
      L::store(u + c * kGlmNarrowRows, e);
      total += e;
    }
  }
  for (int64_t c = 0; c < classes; ++c) {
    const int64_t at = c * kGlmNarrowRows;
    Reg<T> mean = L::load(u + at);
    if (function == kGlmFitSoftmax) mean = mean / total;
    if (function == kGlmFitLogistic) {
      const Reg<T> zero = L::set(0), one = L::set(1), e = exp_of_negative<T>(mean < zero ? mean : -mean);
      mean = (mean < zero ? e : one) / (one + e);
    }
    L::store(u + at, L::load(scales + at) * mean - L::load(targets + at));
  }
}

// out = X^T f(X W) of blocks [first, last); acc has room for the sums by lanes.
template <typename T>
MLOPT_TARGET void narrow(const GlmNarrow<T>& q, int64_t first, int64_t last, const T* w, T* acc, T* out) {
  using L = Lanes<T>;
  constexpr int64_t kVectors = kGlmNarrowRows / L::kLanes;
  constexpr int kGroup = kVectors < 8 ? kVectors : 8;  // vectors of rows whose sums are in registers
  const int64_t width = q.features + (q.bias ? 1 : 0), columns = q.classes;
  alignas(64) T u[kGlmMaxClasses * kGlmNarrowRows];
  for (int64_t k = 0; k < columns * width * L::kLanes; ++k) acc[k] = 0;
  for (int64_t block = first; block < last; ++block) {
    const T* x = q.x + block * kGlmNarrowRows * q.features;
    const int64_t at = block * kGlmNarrowRows * columns;
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t group = 0; group < kVectors; group += kGroup) {
        Reg<T> sums[kGroup];
        const T* own = x + group * L::kLanes;
        for (int v = 0; v < kGroup; ++v) sums[v] = L::set(q.bias ? w[c * q.stride + q.features] : T(0));
        for (int64_t d = 0; d < q.features; ++d) {
          const Reg<T> weight = L::set(w[c * q.stride + d]);
#pragma GCC unroll 8
          for (int v = 0; v < kGroup; ++v)
            sums[v] = L::fma(L::load(own + d * kGlmNarrowRows + v * L::kLanes), weight, sums[v]);
        }
        for (int v = 0; v < kGroup; ++v) L::store(u + c * kGlmNarrowRows + (group + v) * L::kLanes, sums[v]);
      }
    for (int64_t v = 0; v < kGlmNarrowRows; v += L::kLanes)
      narrow_fit(q.function, q.scales + at + v, q.targets + at + v, columns, u + v);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t group = 0; group < kVectors; group += kGroup) {
        Reg<T> us[kGroup];
        const T* own = x + group * L::kLanes;
        for (int v = 0; v < kGroup; ++v) us[v] = L::load(u + c * kGlmNarrowRows + (group + v) * L::kLanes);
        T* sums = acc + c * width * L::kLanes;
        for (int64_t d = 0; d < q.features; ++d, sums += L::kLanes) {
          Reg<T> even = L::load(sums), odd = L::set(0);
#pragma GCC unroll 8
          for (int v = 0; v < kGroup; v += 2) {
            even = L::fma(L::load(own + d * kGlmNarrowRows + v * L::kLanes), us[v], even);
            odd = L::fma(L::load(own + d * kGlmNarrowRows + (v + 1) * L::kLanes), us[v + 1], odd);
          }
          L::store(sums, even + odd);
        }
        if (!q.bias) continue;
        Reg<T> total = L::load(sums);
        for (int v = 0; v < kGroup; ++v) total += us[v];
        L::store(sums, total);
      }
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t d = 0; d < q.stride; ++d)
      out[c * q.stride + d] = d < width ? L::sum(L::load(acc + (c * width + d) * L::kLanes)) : T(0);
}
