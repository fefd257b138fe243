// Inputs for the tests of the family `glm`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../glm/glm.h"
#include "vector_cases.h"

namespace mlopt::testing {

struct GlmShape {
  int64_t tasks, rhs, rows, features, classes;
  bool bias;
};

// Empty axes, one of everything, and sizes around lanes, tiles, row blocks and chunks.
inline const std::vector<GlmShape> kGlmShapes = {
    {1, 1, 7, 0, 2, false},  {0, 1, 3, 2, 1, true},    {1, 0, 3, 2, 1, false},     {1, 1, 0, 3, 2, true},
    {1, 1, 5, 0, 2, true},   {1, 1, 1, 1, 1, false},   {2, 1, 31, 15, 2, true},    {1, 3, 33, 17, 7, false},
    {2, 9, 32, 16, 5, true}, {1, 1, 65, 64, 32, true}, {1, 2, 300, 33, 13, false}, {1, 1, 2000, 40, 10, true}};

// All that a product, a solve or a descent needs, owned.
template <typename T>
struct GlmCase {
  GlmShape s;
  int64_t stride, size, chunk_rows;
  std::vector<T> x, v, diagonal, out, z, losses, partials, values, weights, scales, r, p, state, pap, rr, coefficients;
  std::vector<int64_t> labels;

  GlmCase(const GlmShape& shape, int64_t rows_per_chunk)
      : s(shape),
        stride(glm_stride(s.features, s.bias)),
        size(s.tasks * s.rhs * s.classes * stride),
        chunk_rows(rows_per_chunk),
        x(random_vector<T>(s.tasks * s.rows * s.features, 1)),
        v(packed(random_vector<T>(size, 2))),
        diagonal(packed(random_vector<T>(s.tasks * s.classes * stride, 3))),
        out(size, T(7)),
        z(random_vector<T>(s.tasks * s.rhs * s.rows * s.classes, 4)),
        losses(s.tasks, T(7)),
        partials(s.tasks * glm_num_chunks(s.rows, chunk_rows) * glm_partial_size(s.rhs * s.classes, stride), T(NAN)),
        values(random_vector<T>(s.tasks * s.rows * s.classes * std::max<int64_t>(3, s.classes), 5)),  // for any f
        weights(random_vector<T>(s.tasks * s.rows, 6)),
        scales(random_vector<T>(s.tasks * s.rows * s.classes, 7)),
        r(v),
        p(v),
        state(s.tasks * s.rhs * kNumColumns),
        pap(s.tasks * s.rhs * num_blocks(s.classes * stride)),
        rr(pap.size()),
        coefficients(random_vector<T>(8 * s.classes * stride, 8)),
        labels(s.tasks * s.rows) {
    for (auto& d : diagonal) d = std::fabs(d);
    for (auto& value : values) value = std::fabs(value) / T(s.classes);
    for (auto& weight : weights) weight = std::fabs(weight) / T(s.rows);
    for (auto& scale : scales) scale = std::fabs(scale) / T(s.rows);
    for (size_t k = 0; k < coefficients.size(); ++k)  // small steps, and zeros after the features and the bias
      coefficients[k] = static_cast<int64_t>(k) % stride < s.features + s.bias ? coefficients[k] / 10 : T(0);
    for (size_t k = 0; k < labels.size(); ++k) labels[k] = static_cast<int64_t>(7 * k % s.classes);
    for (int64_t row = 0; row < s.tasks * s.rhs; ++row) {
      const int64_t n = s.classes * stride;
      for (int64_t k = 0; k < n; ++k) state[row * kNumColumns + kRR] += r[row * n + k] * r[row * n + k];
      state[row * kNumColumns + kTolerance2] = T(1e-12);
    }
  }

  std::vector<T> packed(std::vector<T> values_) const {  // zeros after the features and the bias
    for (size_t k = 0; k < values_.size(); ++k)
      if (static_cast<int64_t>(k) % stride >= s.features + s.bias) values_[k] = 0;
    return values_;
  }

  GlmProduct<T> product(GlmFunction function) {
    return {x.data(),
            v.data(),
            diagonal.data(),
            out.data(),
            z.data(),
            losses.data(),
            partials.data(),
            {function, values.data(), weights.data(), labels.data(), false, scales.data()},
            s.tasks,
            s.rows,
            s.features,
            s.classes,
            s.rhs,
            chunk_rows,
            s.bias,
            true,
            true,
            kGlmWide};
  }

  // Three steps from v, with a velocity like it if `moving` is given.
  GlmDescent<T> descent(GlmFunction function, std::vector<T>& w, std::vector<T>* moving, T* loss, T* narrow) {
    w = v;
    if (moving != nullptr) *moving = v;
    GlmProduct<T> inner = product(function);
    inner.v = w.data();
    if (narrow != nullptr) inner.diagonal = nullptr;
    return {inner, w.data(), moving == nullptr ? nullptr : moving->data(), coefficients.data(), loss, narrow, 3};
  }

  GlmCg<T> cg(int64_t max_steps, std::vector<T>& q) {
    q.assign(size, T(0));
    GlmProduct<T> inner = product(kGlmDiagonal);
    inner.v = p.data();
    return {inner, q.data(), r.data(), p.data(), state.data(), pap.data(), rr.data(), max_steps};
  }
};

}  // namespace mlopt::testing
