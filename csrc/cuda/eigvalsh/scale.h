// Around every solver: matrices go in finite and scaled by a power of two into the middle of the exponent range, which
// changes no bit of the mantissas; eigenvalues come out scaled back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/dtype.h"

namespace farms_fast {

// gram: (batch, order, order), scaled in place; a matrix with a value that is not finite becomes 0.
// largest: (batch,), to work with. exponents: (batch,), log2 of the scale taken out, kNonfiniteScale for such a matrix.
void scale_gram(void* gram, int64_t batch, int64_t order, DType dtype, unsigned long long* largest, int* exponents,
                cudaStream_t stream);

// evals: (batch, order), multiplied back; NaN where exponents says so or failed is non-zero. clip: negative values
// become 0.
void unscale_eigenvalues(void* evals, int64_t batch, int64_t order, DType dtype, const int* exponents,
                         const int* failed, bool clip, cudaStream_t stream);

}  // namespace farms_fast
