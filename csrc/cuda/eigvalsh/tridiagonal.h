// Eigenvalues of batches of symmetric tridiagonal matrices of any order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/dtype.h"

namespace farms_fast {

// diagonal, off_diagonal: (batch, order); off_diagonal[i] couples rows i and i + 1, the last of a row is not read.
// stride: 1 for all eigenvalues, 2 for the first, the third and so on, where each is there twice.
// evals: (batch, order / stride), ascending, of type `precision` (f32 or f64; found in float64 either way). A matrix
// with a value that is not finite gives NaN. No workspace, no synchronisation; the same input gives the same bits.
void tridiagonal_eigvalsh(const double* diagonal, const double* off_diagonal, int64_t batch, int64_t order, int stride,
                          DType precision, void* evals, cudaStream_t stream);

}  // namespace farms_fast
