// Eigenvalues of a batch of symmetric matrices by reduction to a band, to a narrower band, to tridiagonal form, and
// bisection. Reduced in float64 whatever the type; complex Hermitian matrices as real symmetric ones of twice the
// order.
//
// Only the lower triangles are kept up to date, in tiles of kMatrixTile x kMatrixTile; tiles on the diagonal are kept
// whole.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/eigvalsh/solver.h"
#include "csrc/host/two_stage_workspace.h"

namespace farms_fast {

// One panel of every matrix: columns [column, column + kWideBand), rows from column + kWideBand on, become an upper
// triangle (written back) and Householder vectors, I - V T V^T.
// gram: (batch, order, order). v: (batch, padded_order, kWideBand), written from the tile of the panel's first row on,
// zero outside of the panel's rows. t: (batch, kWideBand, kWideBand), upper triangular, written.
void panel_qr(double* gram, int batch, int order, int column, double* v, double* t, const CudaDevice& device,
              cudaStream_t stream);

// The same without clusters.
void panel_qr_in_blocks(double* gram, int batch, int order, int column, double* v, double* t, cudaStream_t stream);

// Whether there is a panel to reduce at this column, and whether it is the second one of its column of tiles.
constexpr bool has_panel(int order, int column) { return order - column - kWideBand >= 2; }
constexpr bool is_second_panel(int column) { return column % kMatrixTile != 0; }
static_assert(kMatrixTile == 2 * kWideBand);

// A <- A - V W^T - W V^T with W = A V T - V (T^T V^T A V T) / 2 for the rows and columns from `begin` on: the matrix
// seen through the panel's reflectors. After the first panel of a column of tiles the other tiles are left for the
// second one to update, if there is one.
void apply_panel(double* gram, int batch, int order, int begin, const BandWorkspace& workspace,
                 const CudaDevice& device, cudaStream_t stream);

// The band of half-width kWideBand in memory: tiles of kBandTile x kBandTile, a line of a cache each and one column of
// it after the other. Of four columns, kWideColumn rows from their first diagonal element down take each other's places
// in turn, so that a step of bulge chasing finds its tiles at the same places of every column.
__host__ __device__ constexpr int64_t wide_index(int row, int column) {
  constexpr int tiles = kWideColumn / kBandTile, area = kBandTile * kBandTile;
  return (static_cast<int64_t>(column / kBandTile) * tiles + row / kBandTile % tiles) * area +
         column % kBandTile * kBandTile + row % kBandTile;
}

// The band of the reduced matrices. band: (batch, wide_count(order)), zero outside of it.
void extract_band(const double* gram, int batch, int order, double* band, cudaStream_t stream);

// Half-width kWideBand to kNarrowBand, in place. flags: (batch, kMostFlags), to work with.
void narrow_band(double* band, int batch, int order, int* flags, const CudaDevice& device, cudaStream_t stream);

// Half-width kNarrowBand to tridiagonal. spill: (batch, order + kNarrowColumn, kNarrowColumn), used where the band does
// not fit into shared memory. flags: as above. diagonal: (batch, order). off_diagonal: (batch, order), the last 0.
void chase_bulges(const double* band, int batch, int order, double* spill, int* flags, double* diagonal,
                  double* off_diagonal, const CudaDevice& device, cudaStream_t stream);

}  // namespace farms_fast
