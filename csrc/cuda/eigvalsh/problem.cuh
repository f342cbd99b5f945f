// What the kernels of the one-stage solver are given.
#pragma once

#include <cstdint>

#include "csrc/cuda/eigvalsh/load.cuh"
#include "csrc/dtype.h"
#include "csrc/gram.h"

namespace farms_fast {
namespace one_stage {

struct OneStageProblem {
  const WindowView* windows;  // null for Gram matrices
  const void* gram;
  DType type;  // of the windows or the Gram matrices
  int order;   // of the real matrix: twice the complex one's
  int stride;  // 2 where each eigenvalue is there twice
  int64_t gram_bytes;
  void* evals;
  bool to_float32;  // float32 eigenvalues
  bool clip;        // negative ones become 0

  // The matrix of that number into `matrix`, a tile of the kernel's kind.
  template <typename Matrix>
  __device__ __forceinline__ void form(int64_t which, Matrix& matrix, double* slab) const {
    if (windows != nullptr)
      matrix.gram(windows[which], type, order, slab);
    else
      matrix.read(RealMatrix{static_cast<const char*>(gram) + which * gram_bytes, type, order});
  }

  __device__ __forceinline__ void store(int64_t which, int i, double value) const {
    if (clip && value < 0.0) value = 0.0;
    const int64_t at = which * (order / stride) + i;
    if (to_float32)
      static_cast<float*>(evals)[at] = static_cast<float>(value);
    else
      static_cast<double*>(evals)[at] = value;
  }
};

}  // namespace one_stage
}  // namespace farms_fast
