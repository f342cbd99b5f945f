// The op window_gram on every device: arguments checked, result allocated.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/op_arguments.h"

namespace farms_fast {

struct WindowGramCall {
  WindowTable table;
  DType precision;
  Tensor gram;  // (windows, order, order), to be written
};

WindowGramCall check_window_gram(const std::vector<Tensor>& weights, const Tensor& windows, int64_t order,
                                 ScalarType dtype);

}  // namespace farms_fast
