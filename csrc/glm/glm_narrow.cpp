#include "glm_narrow.h"

#include <algorithm>

#include "glm_tiles.h"

namespace mlopt {
namespace {

// [rows, width] by rows -> blocks [width, kGlmNarrowRows].
template <typename T>
void copy_to_blocks(const T* from, int64_t rows, int64_t width, T* to) {
  for (int64_t begin = 0; begin < rows; begin += kGlmNarrowRows, to += width * kGlmNarrowRows) {
    const int64_t count = std::min(kGlmNarrowRows, rows - begin);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t i = 0; i < count; ++i) to[j * kGlmNarrowRows + i] = from[(begin + i) * width + j];
      std::fill(to + j * kGlmNarrowRows + count, to + (j + 1) * kGlmNarrowRows, T(0));
    }
  }
}

}  // namespace

template <typename T>
void glm_narrow_descent_cpu(const GlmDescent<T>& q, ParallelFor pool) {
  const GlmProduct<T>& p = q.product;
  const int64_t rows = p.rows, features = p.features, classes = p.classes, size = q.size();
  const int64_t blocks = glm_narrow_blocks(rows), per_chunk = glm_narrow_chunk(rows, features, classes);
  const int64_t chunks = (blocks + per_chunk - 1) / per_chunk, partial_size = glm_narrow_partial(features, classes);
  T *x = q.narrow, *scales = x + blocks * kGlmNarrowRows * features,
    *targets = scales + blocks * kGlmNarrowRows * classes, *partials = targets + blocks * kGlmNarrowRows * classes;
  copy_to_blocks(static_cast<const T*>(p.x), rows, features, x);
  copy_to_blocks(p.rows_function.scales, rows, classes, scales);
  copy_to_blocks(p.rows_function.values, rows, classes, targets);
  const GlmNarrow<T> narrow{p.rows_function.function, x, scales, targets, features, classes, p.stride(), p.bias};
  const GlmTiles<T>& tiles = glm_tiles<T>();
  const int64_t sums = classes * (features + 1) * kGlmMostLanes;  // where a chunk's packed sum begins
  auto run = [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      T* own = partials + chunk * partial_size;
      tiles.narrow(narrow, chunk * per_chunk, std::min(blocks, (chunk + 1) * per_chunk), q.w, own,
                   chunks == 1 ? p.out : own + sums);
    }
  };
  if (chunks == 0) std::fill_n(p.out, size, T(0));
  for (int64_t k = 0; k < q.num_steps; ++k) {
    if (chunks == 1)
      run(0, 1);
    else
      parallel_for(pool, chunks, 1, run);
    for (int64_t chunk = 0; chunk < chunks && chunks > 1; ++chunk) {
      const T* part = partials + chunk * partial_size + sums;
      for (int64_t j = 0; j < size; ++j) p.out[j] = chunk == 0 ? part[j] : p.out[j] + part[j];
    }
    for (int64_t j = 0; j < size; ++j) q.update(j, q.w, q.velocity, p.out);
  }
}

template void glm_narrow_descent_cpu<float>(const GlmDescent<float>&, ParallelFor);
template void glm_narrow_descent_cpu<double>(const GlmDescent<double>&, ParallelFor);

}  // namespace mlopt
