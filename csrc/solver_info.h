// What a build with CUDA adds to the ops about solvers: csrc/cuda sets it when the library is loaded.
#pragma once

#include "csrc/host/cuda_solvers.h"

namespace farms_fast {

// Each as its library tells it.
struct CudaVersions {
  int driver;
  int runtime;
  int cusolver;
};

struct CudaMachine {
  CudaDevice (*current_device)();

  // Bytes of a solver's workspace on the current device.
  int64_t (*workspace_bytes)(const CudaSolverTraits& solver, int64_t batch, int64_t order, DType gram);

  CudaVersions (*versions)();
};

extern const CudaMachine* cuda_machine;  // null in a build without CUDA

}  // namespace farms_fast
