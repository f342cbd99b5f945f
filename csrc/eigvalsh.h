// The ops eigvalsh and window_eigvalsh on every device: arguments checked, results allocated. The solver's name is
// checked where the device's solvers are known.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/op_arguments.h"

namespace farms_fast {

struct EigvalshCall {
  DType dtype;   // of the Gram matrices
  Tensor evals;  // (batch, order), to be written
};

EigvalshCall check_eigvalsh(const Tensor& gram, int64_t memory_budget);

struct WindowEigvalshCall {
  WindowTable table;
  DType precision;
  Tensor evals;  // (windows, order), to be written

  DType gram() const { return gram_dtype(table.dtype, precision); }
};

WindowEigvalshCall check_window_eigvalsh(const std::vector<Tensor>& weights, const Tensor& windows, int64_t order,
                                         ScalarType dtype, int64_t memory_budget);

}  // namespace farms_fast
