// The workspace of the CUDA two-stage solver: how wide its bands are, what arrays it needs and where each of them lies.
// Host arithmetic only, so that a machine without CUDA can tell the bytes too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/dtype.h"

namespace farms_fast {

constexpr int kWideBand = 32;   // half-width of the band after the first reduction, and width of its panels
constexpr int kNarrowBand = 4;  // half-width after the second
constexpr int kMatrixTile = 64;

// Doubles that a stored column of a band takes: from its diagonal element down, bulges included.
constexpr int kWideColumn = 2 * kWideBand;
constexpr int kNarrowColumn = 2 * kNarrowBand;

constexpr int64_t padded_order(int64_t order) { return (order + kMatrixTile - 1) / kMatrixTile * kMatrixTile; }

// The band of half-width kWideBand is stored in tiles of kBandTile x kBandTile, see wide_index.
constexpr int kBandTile = 4;
constexpr int64_t wide_columns(int64_t order) { return (order + kBandTile - 1) / kBandTile * kBandTile + kWideColumn; }
constexpr int64_t wide_count(int64_t order) { return wide_columns(order) * kWideColumn; }

// What the band of half-width kNarrowBand takes in shared memory. A longer one passes through it.
constexpr int64_t narrow_band_bytes(int64_t order, int pitch) {
  return (order + kNarrowColumn) * pitch * static_cast<int64_t>(sizeof(double));
}

constexpr int kMostShares = 3;
struct BandWorkspace {
  double* v[2];     // (batch, padded_order, kWideBand), of the two panels of a column of tiles
  double* w[2];     // likewise
  double* product;  // (batch, padded_order, kWideBand): A V
  double* t;        // (batch, kWideBand, kWideBand)
  double* partial;  // (batch, padded_order / kMatrixTile, kMostShares, kWideBand, kWideBand): of small products, tile
                    // by tile
  double* middle;   // (batch, kMostShares, kWideBand, kWideBand): T^T V^T A V T / 2; W^T V T and V^T V T, W and V on
                    // the left of the first panel
  unsigned* done;   // (batch,), zero
};

// Flags by which the blocks of a matrix wait for each other where there are no clusters, one for each of their warps.
constexpr int kMostFlags = 64;

struct TwoStageWorkspace {
  BandWorkspace panels;
  double* band;          // (batch, wide_count(order))
  double* spill;         // (batch, order + kNarrowColumn, kNarrowColumn), of narrow bands that pass through
  int* flags;            // (batch, kMostFlags)
  double* diagonal;      // (batch, order)
  double* off_diagonal;  // (batch, order)
  double* matrices;      // (batch, order, order), the matrices as real float64 ones; null where they are that already
  size_t bytes;
};

// Complex Hermitian matrices are reduced as real symmetric ones of twice the order.
constexpr int reals(DType gram) { return is_complex(gram) ? 2 : 1; }

// The arrays one after the other, from `workspace` on. order: of the real matrices, reals(gram) times the Gram
// matrices'.
inline TwoStageWorkspace lay_out_two_stage(void* workspace, int64_t batch, int64_t order, DType gram) {
  constexpr size_t alignment = 256;
  const int64_t padded = padded_order(order), panel = padded * kWideBand, square = kWideBand * kWideBand;
  const uintptr_t base = reinterpret_cast<uintptr_t>(workspace);  // may be null, for the bytes alone
  size_t used = 0;
  const auto take = [&](int64_t per_matrix) {
    double* array = reinterpret_cast<double*>(base + used);
    used += (static_cast<size_t>(batch * per_matrix) * sizeof(double) + alignment - 1) / alignment * alignment;
    return array;
  };
  TwoStageWorkspace layout = {};
  for (int i = 0; i < 2; ++i) {
    layout.panels.v[i] = take(panel);
    layout.panels.w[i] = take(panel);
  }
  layout.panels.product = take(panel);
  layout.panels.t = take(square);
  layout.panels.partial = take(padded / kMatrixTile * kMostShares * square);
  layout.panels.middle = take(kMostShares * square);
  layout.panels.done = reinterpret_cast<unsigned*>(take(1));
  layout.band = take(wide_count(order));
  layout.spill = take((order + kNarrowColumn) * kNarrowColumn);
  layout.flags = reinterpret_cast<int*>(take(kMostFlags * sizeof(int) / sizeof(double)));
  layout.diagonal = take(order);
  layout.off_diagonal = take(order);
  if (gram != DType::f64) layout.matrices = take(order * order);
  layout.bytes = used;
  return layout;
}

}  // namespace farms_fast
