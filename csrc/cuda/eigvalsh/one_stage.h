// Eigenvalues of small matrices in one launch: a block, or a cluster of blocks, reads its window, forms the Gram matrix
// in its registers, reduces it to tridiagonal form there and finds the eigenvalues. Needs no workspace and never waits
// for the host. The blocks of a cluster each read the whole window: of large windows the Gram matrix is better formed
// before, by all of the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/dtype.h"
#include "csrc/gram.h"
#include "csrc/host/cuda_solvers.h"

namespace farms_fast {

// windows: (count,) in device memory, of `order` vectors of type `in`. evals: (count, order), of type `precision` (f32
// or f64; found in float64 either way), ascending, negative rounding noise as 0. A window with a value that is not
// finite, or whose squares overflow, gives NaN.
void one_stage_windows(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision, void* evals,
                       cudaStream_t stream);

// gram: (count, order, order) of type `dtype`, its lower triangle read, nothing written. evals: (count, order), of type
// `precision`, ascending; NaN for a matrix with a value that is not finite. clip: negative values become 0.
void one_stage_gram(const void* gram, int64_t count, int64_t order, DType dtype, DType precision, bool clip,
                    void* evals, cudaStream_t stream);

}  // namespace farms_fast
