// Which CUDA solver "auto" stands for on a device by a measurement of that very GPU, told at run time.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace farms_fast {

// The solver in the rows of a device, null where none of them holds such matrices. device: its index, -1 for GPUs that
// are not there.
const char* choice_of_device(int device, int64_t count, int64_t order, DType gram);

}  // namespace farms_fast
