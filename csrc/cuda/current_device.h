// The current CUDA device, as far as it decides which solvers run and how.
#pragma once

#include "csrc/host/cuda_solvers.h"

namespace farms_fast {

// As the code that runs there knows it: code that was built for an older architecture has that one's clusters and
// shared memory on a younger device too.
CudaDevice current_device();

}  // namespace farms_fast
