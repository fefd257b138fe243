// The tiles for one instruction set. No include guard: glm_tiles.cpp includes it once per instruction set, inside a
// namespace that defines
//   MLOPT_TARGET   the function attribute that enables the instruction set
//   Lanes<T>       Reg, kLanes, load, load_part, set, store, fma, sum
//   kTile          rows (forward) or vectors of features (backward) per tile
//   kTileColumns   columns per tile; kTile * kTileColumns accumulators, kTile operands and one more fit the registers

template <typename T, int kRows, int kColumns>
MLOPT_TARGET void forward_tile(const T* x, int64_t features, const T* v, int64_t stride, T* u, int64_t columns,
                               int64_t ahead) {
  using L = Lanes<T>;
  typename L::Reg acc[kRows][kColumns], xs[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) acc[i][c] = L::set(0);
  int64_t d = 0;
  for (; d + L::kLanes <= features; d += L::kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      xs[i] = L::load(x + i * features + d);
      prefetch(x + i * features + d, ahead);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const auto vs = L::load(v + c * stride + d);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) acc[i][c] = L::fma(xs[i], vs, acc[i][c]);
    }
  }
  if (d < features) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) xs[i] = L::load_part(x + i * features + d, features - d);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const auto vs = L::load_part(v + c * stride + d, features - d);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) acc[i][c] = L::fma(xs[i], vs, acc[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) u[i * columns + c] = L::sum(acc[i][c]);
}

// kVectors vectors of features or, if kPart, the `part` features that are left.
template <typename T, int kVectors, int kColumns, bool kPart>
MLOPT_TARGET void backward_tile(const T* x, int64_t rows, int64_t features, const T* u, int64_t columns, T* acc_out,
                                int64_t stride, int64_t part, int64_t ahead) {
  using L = Lanes<T>;
  typename L::Reg acc[kVectors][kColumns], xs[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) acc[j][c] = L::load(acc_out + c * stride + j * L::kLanes);
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      xs[j] = kPart ? L::load_part(x + i * features, part) : L::load(x + i * features + j * L::kLanes);
      prefetch(x + i * features + j * L::kLanes, ahead);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const auto us = L::set(u[i * columns + c]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[j][c] = L::fma(xs[j], us, acc[j][c]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) L::store(acc_out + c * stride + j * L::kLanes, acc[j][c]);
}

template <typename T, int kColumns>
MLOPT_TARGET void forward_columns(const T* x, int64_t rows, int64_t features, const T* v, int64_t columns,
                                  int64_t stride, T* u, int64_t ahead) {
  int64_t i = 0;
  for (; i + kTile <= rows; i += kTile)
    forward_tile<T, kTile, kColumns>(x + i * features, features, v, stride, u + i * columns, columns, ahead);
  for (; i < rows; ++i)
    forward_tile<T, 1, kColumns>(x + i * features, features, v, stride, u + i * columns, columns, ahead);
}

template <typename T, int kColumns>
MLOPT_TARGET void backward_columns(const T* x, int64_t rows, int64_t features, const T* u, int64_t columns,
                                   int64_t stride, T* acc, int64_t ahead) {
  constexpr int64_t kLanes = Lanes<T>::kLanes;
  int64_t d = 0;
  for (; d + kTile * kLanes <= features; d += kTile * kLanes)
    backward_tile<T, kTile, kColumns, false>(x + d, rows, features, u, columns, acc + d, stride, 0, ahead);
  for (; d + kLanes <= features; d += kLanes)
    backward_tile<T, 1, kColumns, false>(x + d, rows, features, u, columns, acc + d, stride, 0, ahead);
  if (d < features)
    backward_tile<T, 1, kColumns, true>(x + d, rows, features, u, columns, acc + d, stride, features - d, ahead);
}

// Cuts the columns into tiles of nearly equal width: ten are five and five, not six and four.
#define MLOPT_FOR_COLUMN_TILES(call)                                                      \
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;                      \
  for (int64_t k = 0; k < tiles; ++k) {                                                   \
    const int64_t first = columns * k / tiles, width = columns * (k + 1) / tiles - first; \
    switch (width) {                                                                      \
      case 1:                                                                             \
        call(1);                                                                          \
        break;                                                                            \
      case 2:                                                                             \
        call(2);                                                                          \
        break;                                                                            \
      case 3:                                                                             \
        call(3);                                                                          \
        break;                                                                            \
      case 4:                                                                             \
        call(4);                                                                          \
        break;                                                                            \
      case 5:                                                                             \
        call(5);                                                                          \
        break;                                                                            \
      default:                                                                            \
        call(6);                                                                          \
        break;                                                                            \
    }                                                                                     \
  }

template <typename T>
void forward(const T* x, int64_t rows, int64_t features, const T* v, int64_t columns, int64_t stride, T* u,
             int64_t ahead) {
  static_assert(kTileColumns == 6);
#define MLOPT_CALL(n) forward_columns<T, n>(x, rows, features, v + first * stride, columns, stride, u + first, ahead)
  MLOPT_FOR_COLUMN_TILES(MLOPT_CALL)
#undef MLOPT_CALL
}

template <typename T>
void backward(const T* x, int64_t rows, int64_t features, const T* u, int64_t columns, int64_t stride, T* acc,
              int64_t ahead) {
#define MLOPT_CALL(n) backward_columns<T, n>(x, rows, features, u + first, columns, stride, acc + first * stride, ahead)
  MLOPT_FOR_COLUMN_TILES(MLOPT_CALL)
#undef MLOPT_CALL
}

#undef MLOPT_FOR_COLUMN_TILES
