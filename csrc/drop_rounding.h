// The op drop_rounding on every device: argument checked, result allocated.
#pragma once

#include <cstdint>

#include "csrc/op_arguments.h"

namespace farms_fast {

struct DropRoundingCall {
  int64_t windows, order;
  DType dtype;     // float32 or float64
  Tensor dropped;  // (windows, order), to be written
};

DropRoundingCall check_drop_rounding(const Tensor& evals);

}  // namespace farms_fast
