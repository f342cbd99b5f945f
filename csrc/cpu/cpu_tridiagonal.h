// What the two-stage eigenvalue solver does once the matrix is a band.
#pragma once

#include <cstdint>

namespace farms_fast {

// Half-width of the band: columns of one panel, and length of the reflectors that chase its bulges.
constexpr int64_t band_width = 32;

// Element (i, j) of the packed band lies at band[j * band_stride + i]: a column holds the band and a bulge below it.
constexpr int64_t band_stride = 2 * band_width;

// Columns of zeros behind the last one let every step work on whole blocks.
constexpr int64_t band_elements(int64_t order) { return (order + band_width) * band_stride + order + 3 * band_width; }

// band: lower band, zero below it and outside of the matrix; destroyed.
// diagonal: (order,). off_diagonal: (order,), of which the last is 0.
void band_to_tridiagonal(double* band, int64_t order, double* diagonal, double* off_diagonal);
void band_to_tridiagonal(float* band, int64_t order, double* diagonal, double* off_diagonal);

// diagonal becomes the eigenvalues, ascending; off_diagonal is destroyed. False where the iteration does not converge.
bool tridiagonal_eigenvalues(double* diagonal, double* off_diagonal, int64_t order);

}  // namespace farms_fast
