// What a CUDA eigenvalue solver is to the rest of the library. A new solver is a file in this folder and a line in
// solvers.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../../dtype.h"

namespace farms_fast {

struct CudaSolver {
  const char* name;

  // The largest batch that one call takes.
  int64_t (*max_batch)(int64_t order, DType dtype);

  // Bytes of device workspace for a batch. Never less for a larger batch.
  size_t (*workspace_bytes)(int64_t batch, int64_t order, DType dtype);

  // gram: (batch, order, order), finite, scaled into the middle of the exponent range, destroyed.
  // evals: (batch, order), ascending, of type real_dtype(dtype).
  // failed: (batch,), set to non-zero where no eigenvalues were found.
  void (*solve)(void* gram, int64_t batch, int64_t order, DType dtype, void* workspace, void* evals, int* failed,
                cudaStream_t stream);
};

const CudaSolver& cusolver();

}  // namespace farms_fast
