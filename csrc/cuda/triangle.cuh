// The tiles of a matrix's lower triangle, counted row by row: tile row r begins at r (r + 1) / 2.
#pragma once

namespace farms_fast {

// The tile row that a tile lies in.
template <typename Index>
__device__ __forceinline__ Index triangle_row(Index tile) {
  Index row = static_cast<Index>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
  while ((row + 1) * (row + 2) / 2 <= tile) ++row;
  while (row * (row + 1) / 2 > tile) --row;
  return row;
}

}  // namespace farms_fast
