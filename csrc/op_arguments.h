// Checks of arguments that several ops have. Each raises the error of the op that asks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "csrc/dtype.h"
#include "csrc/gram.h"

namespace farms_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The element type of weights.
DType weight_dtype(const char* op, ScalarType type);

// The element type of Gram matrices: float32, float64, complex64 or complex128. argument: its name in the op.
DType gram_matrix_dtype(const char* op, const char* argument, ScalarType type);

// The argument `dtype` of an op: float64 or float32.
DType precision_of(const char* op, ScalarType type);

// The reverse, for results.
ScalarType scalar_type(DType dtype);

void check_memory_budget(const char* op, int64_t bytes);

// The windows of a window table, on the weights.
struct WindowTable {
  std::vector<Window> windows;
  DType dtype;  // of the weights

  int64_t count() const { return static_cast<int64_t>(windows.size()); }
};

// weights: stacks (entries, rows, columns). table: (windows, 6), the columns weight, entry, row, column, rows, columns.
// Every row is checked here, on the host: a kernel never sees a window that leaves its weight.
WindowTable read_window_table(const char* op, const std::vector<Tensor>& weights, const Tensor& table, int64_t order);

}  // namespace farms_fast
