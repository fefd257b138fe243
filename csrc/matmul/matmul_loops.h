// The products of matmul.h for one instruction set. No include guard: matmul_cpu.cpp includes it once per instruction
// set, inside a namespace that defines
//   MLOPT_TARGET   the function attribute that enables the instruction set
//   Lanes<T>       Reg, kLanes, load, load_part, set, store, fma
//   kTileRows, kTileVectors   the tile of C that is kept in registers: rows, and vectors of columns. The accumulators,
//                             kTileVectors vectors of B and one element of A fit the registers.
//
// Lanes run over columns. A strip of kTileVectors vectors of B's columns is packed, so that its vectors lie one after
// the other and its last one is padded with zeros; A is read in place, one element at a time.

// The first `count` < kLanes lanes.
template <typename T>
MLOPT_TARGET inline void store_part(T* p, typename Lanes<T>::Reg r, int64_t count) {
  using L = Lanes<T>;
  alignas(64) T lanes[L::kLanes];
  L::store(lanes, r);
  int64_t done = 0;
#pragma GCC unroll 8
  for (int piece = L::kLanes / 2; piece > 0; piece /= 2)
    if (count & piece) {
      std::memcpy(p + done, lanes + done, piece * sizeof(T));
      done += piece;
    }
}

// c = start + A B for kRows rows and kVectors vectors of columns; the last of them has `part` columns if kPart.
// start_row is 0 where all rows start alike.
template <typename T, int kRows, int kVectors, bool kPart>
MLOPT_TARGET void tile(const T* a, int64_t a_row, int64_t a_column, int64_t depth, const T* b, int64_t b_row,
                       const T* start, int64_t start_row, T* c, int64_t c_row, int64_t part) {
  using L = Lanes<T>;
  constexpr int kWhole = kPart ? kVectors - 1 : kVectors;
  typename L::Reg acc[kRows][kVectors], bs[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kWhole; ++v) acc[i][v] = L::load(start + i * start_row + v * L::kLanes);
    if (kPart) acc[i][kWhole] = L::load_part(start + i * start_row + kWhole * L::kLanes, part);
  }
  const T* rows[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) rows[i] = a + i * a_row;
  int64_t at = 0;
  for (int64_t k = 0; k < depth; ++k, at += a_column, b += b_row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) bs[v] = L::load(b + v * L::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto x = L::set(rows[i][at]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[i][v] = L::fma(x, bs[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kWhole; ++v) L::store(c + i * c_row + v * L::kLanes, acc[i][v]);
    if (kPart) store_part<T>(c + i * c_row + kWhole * L::kLanes, acc[i][kWhole], part);
  }
}

// All rows of a strip, in tiles of nearly equal height. `part`: the columns of the last vector, or 0 if it is whole.
// With `spill` a row's last vector is stored as a whole where C goes on behind it: rows from the first to the last and
// strips from the last to the first, what it overwrites is written later.
template <typename T, int kVectors>
MLOPT_TARGET void strip(const SmallMatmul<T>& q, const T* a, int64_t depth, const T* b, int64_t b_row, const T* start,
                        int64_t start_row, T* c, int64_t part, bool spill) {
  static_assert(kTileRows == 6);
  const int64_t tiles = (q.rows + kTileRows - 1) / kTileRows;
  int64_t first = 0;
  for (int64_t k = 0; k < tiles; ++k) {
    const int64_t last = q.rows * (k + 1) / tiles;
    const T *const from = a + first * q.a_row, *const begin = start + first * start_row;
    T* const to = c + first * q.columns;
    const bool fits = c + (last - 1) * q.columns + kVectors * Lanes<T>::kLanes <= q.c + q.rows * q.columns;
    switch (2 * (last - first) + (part != 0 && !(spill && fits))) {
#define MLOPT_TILE(n, kPart)                                                                                        \
  case 2 * n + kPart:                                                                                               \
    tile<T, n, kVectors, kPart>(from, q.a_row, q.a_column, depth, b, b_row, begin, start_row, to, q.columns, part); \
    break;
#define MLOPT_ROWS(n)  \
  MLOPT_TILE(n, false) \
  MLOPT_TILE(n, true)
      MLOPT_ROWS(1)
      MLOPT_ROWS(2)
      MLOPT_ROWS(3)
      MLOPT_ROWS(4)
      MLOPT_ROWS(5)
      MLOPT_ROWS(6)
#undef MLOPT_ROWS
#undef MLOPT_TILE
    }
    first = last;
  }
}

// A square of 16 bytes by 16 bytes, transposed.
template <typename T>
MLOPT_TARGET inline void transpose_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int kSide = 16 / sizeof(T);
  typedef T Row __attribute__((vector_size(16)));
  Row r[kSide];
#pragma GCC unroll 4
  for (int i = 0; i < kSide; ++i) std::memcpy(&r[i], from + i * from_row, 16);
  if constexpr (kSide == 4) {
    const Row a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5),
              c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  } else {
    const Row a = __builtin_shufflevector(r[0], r[1], 0, 2);
    r[1] = __builtin_shufflevector(r[0], r[1], 1, 3);
    r[0] = a;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSide; ++i) std::memcpy(to + i * to_row, &r[i], 16);
}

// packed[k * width + j] = b[k * b_row + j * b_column], and 0 from `columns` to the end of the last vector.
template <typename T>
MLOPT_TARGET void pack(const T* b, int64_t b_row, int64_t b_column, int64_t depth, int64_t columns, int64_t width,
                       T* packed) {
  using L = Lanes<T>;
  if (b_column == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      int64_t j = 0;
      for (; j + L::kLanes <= columns; j += L::kLanes) L::store(packed + k * width + j, L::load(b + k * b_row + j));
      if (j < columns) L::store(packed + k * width + j, L::load_part(b + k * b_row + j, columns - j));
    }
    return;
  }
  constexpr int64_t kSide = 16 / sizeof(T);
  const int64_t padded = (columns + L::kLanes - 1) / L::kLanes * L::kLanes;
  int64_t j = 0;
  for (; b_row == 1 && j + kSide <= columns; j += kSide) {
    int64_t k = 0;
    for (; k + kSide <= depth; k += kSide)
      transpose_square(b + j * b_column + k, b_column, packed + k * width + j, width);
    for (; k < depth; ++k)
      for (int64_t i = j; i < j + kSide; ++i) packed[k * width + i] = b[i * b_column + k];
  }
  for (; j < padded; ++j)
    for (int64_t k = 0; k < depth; ++k) packed[k * width + j] = j < columns ? b[k * b_row + j * b_column] : T(0);
}

template <typename T>
MLOPT_TARGET void multiply(const SmallMatmul<T>& q) {
  using L = Lanes<T>;
  constexpr int64_t kDepth = 256, kWidth = kTileVectors * L::kLanes;  // a packed strip fits into L1, or L2 for AVX-512
  alignas(64) T packed[kDepth * kWidth];
  alignas(64) T bias[kWidth];
  if (q.rows == 0) return;
  // From the last strip to the first, see `strip`.
  for (int64_t column = (q.columns + kWidth - 1) / kWidth * kWidth - kWidth; column >= 0; column -= kWidth) {
    const int64_t columns = q.columns - column < kWidth ? q.columns - column : kWidth;
    const int64_t vectors = (columns + L::kLanes - 1) / L::kLanes, part = columns % L::kLanes;
    for (int64_t j = 0; j < kWidth; ++j)
      bias[j] = q.bias != nullptr && j < columns ? q.bias[(column + j) * q.bias_stride] : T(0);
    T* const c = q.c + column;
    int64_t k = 0;
    do {  // once even if the depth is 0
      const int64_t depth = q.depth - k < kDepth ? q.depth - k : kDepth;
      const T *b = q.b + k * q.b_row + column * q.b_column, *const a = q.a + k * q.a_column;
      int64_t b_row = q.b_row;
      // Packing costs as much as reading it once more.
      if (q.b_column != 1 || part != 0 || q.rows > 2 * kTileRows) {
        pack(b, q.b_row, q.b_column, depth, columns, kWidth, packed);
        b = packed;
        b_row = kWidth;
      }
      const T* start = k == 0 ? bias : c;
      const int64_t start_row = k == 0 ? 0 : q.columns;
      const bool spill = q.depth <= kDepth;  // else there are sums below that are not complete
      static_assert(kTileVectors == 2 || kTileVectors == 4);
      if (vectors == 1) strip<T, 1>(q, a, depth, b, b_row, start, start_row, c, part, spill);
      if (vectors == 2) strip<T, 2>(q, a, depth, b, b_row, start, start_row, c, part, spill);
      if constexpr (kTileVectors == 4) {
        if (vectors == 3) strip<T, 3>(q, a, depth, b, b_row, start, start_row, c, part, spill);
        if (vectors == 4) strip<T, 4>(q, a, depth, b, b_row, start, start_row, c, part, spill);
      }
      k += depth;
    } while (k < q.depth);
  }
}
