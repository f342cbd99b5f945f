// What a CUDA eigenvalue solver is to the rest of the library. A new solver is a file in this folder and an entry of
// solvers() in eigvalsh.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "csrc/dtype.h"
#include "csrc/gram.h"

namespace farms_fast {

// Reads windows or Gram matrices where they are, needs no workspace, and takes care of scale and of values that are not
// finite by itself.
struct DirectSolver {
  // The largest order of windows that it reads by itself; of larger ones it is given the Gram matrices.
  int64_t (*max_window_order)(DType gram);

  // windows: (count,) in device memory. evals: (count, order), of type `precision`, ascending, negative rounding noise
  // as 0, NaN for a window with a value that is not finite.
  void (*solve_windows)(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision, void* evals,
                        cudaStream_t stream);

  // gram: (count, order, order), read only. evals: (count, order), of type `precision`, ascending, NaN for a matrix
  // with a value that is not finite. clip: negative values become 0.
  void (*solve_gram)(const void* gram, int64_t count, int64_t order, DType dtype, DType precision, bool clip,
                     void* evals, cudaStream_t stream);
};

// Works on Gram matrices in place, in chunks; see scale.h for what is done around it.
struct InPlaceSolver {
  // The largest batch that one call takes.
  int64_t (*max_batch)(int64_t order, DType dtype);

  // Bytes of device workspace for a batch. Never less for a larger batch.
  size_t (*workspace_bytes)(int64_t batch, int64_t order, DType dtype);

  // gram: (batch, order, order), both triangles filled, finite, scaled into the middle of the exponent range,
  // destroyed. evals: (batch, order), ascending, of type real_dtype(dtype). failed: (batch,), set to non-zero where no
  // eigenvalues were found, else to 0.
  void (*solve)(void* gram, int64_t batch, int64_t order, DType dtype, void* workspace, void* evals, int* failed,
                cudaStream_t stream);
};

struct CudaSolver {
  const char* name;

  // The largest order that it takes; 0 where it does not take Gram matrices of this type.
  int64_t (*max_order)(DType gram);

  // One of the two.
  const DirectSolver* direct;
  const InPlaceSolver* in_place;
};

const CudaSolver& cusolver();
const CudaSolver& two_stage();

}  // namespace farms_fast
