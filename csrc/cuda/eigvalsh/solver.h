// What a CUDA eigenvalue solver is to the rest of the library. A new solver is its traits in host/cuda_solvers.h, a
// file in this folder and an entry of the list in eigvalsh.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/dtype.h"
#include "csrc/gram.h"
#include "csrc/host/cuda_solvers.h"

namespace farms_fast {

// Reads windows or Gram matrices where they are, needs no workspace, and takes care of scale and of values that are not
// finite by itself.
struct DirectSolver {
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
  // Bytes of device workspace for a batch on the current device, where the traits may only estimate them.
  int64_t (*workspace_bytes)(int64_t batch, int64_t order, DType dtype);

  // gram: (batch, order, order), both triangles filled, finite, scaled into the middle of the exponent range,
  // destroyed. evals: (batch, order), ascending, of type real_dtype(dtype). failed: (batch,), set to non-zero where no
  // eigenvalues were found, else to 0.
  void (*solve)(void* gram, int64_t batch, int64_t order, DType dtype, void* workspace, void* evals, int* failed,
                cudaStream_t stream);
};

struct CudaSolver {
  const CudaSolverTraits& traits;

  // One of the two.
  const DirectSolver* direct;
  const InPlaceSolver* in_place;
};

const CudaSolver& cusolver();
int cusolver_version();  // 1000 * major + 100 * minor + patch of the library that is loaded
const CudaSolver& two_stage();

}  // namespace farms_fast
