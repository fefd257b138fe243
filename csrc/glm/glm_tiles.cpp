// The instruction sets of glm_tiles.h.
//
// target_clones, as in the family `vector`, would compile one tile shape for all; here the tile must fit the registers
// of the instruction set, so each has a namespace with its own lanes and tile. Tiles use fused multiply-adds: results
// differ between instruction sets in the last bits, never between two runs on one machine.
#include "glm_tiles.h"

#include "../common/lanes.h"

namespace mlopt {
namespace {

// Into L2: L1 holds the strip that is being read.
template <typename T>
inline void prefetch(const T* x, int64_t ahead) {
#ifdef __GNUC__
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(x) + ahead * sizeof(T)), 0, 2);
#else
  (void)x, (void)ahead;
#endif
}

namespace portable {
#define MLOPT_TARGET
constexpr int kTile = 2, kTileColumns = 6;

using lanes::portable::Lanes;
#include "glm_narrow_loops.h"
#include "glm_tile_loops.h"
#undef MLOPT_TARGET
}  // namespace portable

#ifdef MLOPT_X86
namespace avx2 {
#define MLOPT_TARGET MLOPT_TARGET_AVX2
constexpr int kTile = 2, kTileColumns = 6;

using lanes::avx2::Lanes;
#include "glm_narrow_loops.h"
#include "glm_tile_loops.h"
#undef MLOPT_TARGET
}  // namespace avx2

namespace avx512 {
#define MLOPT_TARGET MLOPT_TARGET_AVX512
constexpr int kTile = 4, kTileColumns = 6;

using lanes::avx512::Lanes;
#include "glm_narrow_loops.h"
#include "glm_tile_loops.h"
#undef MLOPT_TARGET
}  // namespace avx512
#endif

}  // namespace

template <typename T>
int glm_all_tiles(GlmTiles<T>* tiles) {
  int count = 0;
#ifdef MLOPT_X86
  if (lanes::avx512::is_supported())
    tiles[count++] = {avx512::forward<T>, avx512::backward<T>, avx512::narrow<T>, "avx512"};
  if (lanes::avx2::is_supported()) tiles[count++] = {avx2::forward<T>, avx2::backward<T>, avx2::narrow<T>, "avx2"};
#endif
  tiles[count++] = {portable::forward<T>, portable::backward<T>, portable::narrow<T>, "portable"};
  return count;
}

template <typename T>
const GlmTiles<T>& glm_tiles() {
  static const GlmTiles<T> best = [] {
    GlmTiles<T> tiles[3];
    glm_all_tiles(tiles);
    return tiles[0];
  }();
  return best;
}

template int glm_all_tiles<float>(GlmTiles<float>*);
template int glm_all_tiles<double>(GlmTiles<double>*);
template const GlmTiles<float>& glm_tiles<float>();
template const GlmTiles<double>& glm_tiles<double>();

}  // namespace mlopt
