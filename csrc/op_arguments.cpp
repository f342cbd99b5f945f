#include "csrc/op_arguments.h"

#include <algorithm>

#include "csrc/op_check.h"

namespace farms_fast {
namespace {

constexpr int64_t kWindowColumns = 6;  // weight, entry, row, column, rows, columns

// A weight as its windows see it.
struct Stack {
  const char* data;
  int64_t size[3], stride[3];
};

}  // namespace

DType weight_dtype(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::ComplexFloat:
      return DType::c64;
    case ScalarType::ComplexDouble:
      return DType::c128;
    default:
      fail(op, ": argument 'weights': expected float16, bfloat16, float32, float64, complex64 or complex128, got ",
           torch::headeronly::toString(type));
  }
}

DType gram_matrix_dtype(const char* op, const char* argument, ScalarType type) {
  const bool taken = type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::ComplexFloat ||
                     type == ScalarType::ComplexDouble;
  FARMS_CHECK(taken, op, argument, "expected float32, float64, complex64 or complex128, got ",
              torch::headeronly::toString(type));
  return weight_dtype(op, type);
}

DType precision_of(const char* op, ScalarType type) {
  if (type == ScalarType::Double) return DType::f64;
  FARMS_CHECK(type == ScalarType::Float, op, "dtype", "expected float64 or float32, got ",
              torch::headeronly::toString(type));
  return DType::f32;
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ScalarType::Float;
    case DType::c64:
      return ScalarType::ComplexFloat;
    case DType::c128:
      return ScalarType::ComplexDouble;
    default:
      return ScalarType::Double;
  }
}

void check_memory_budget(const char* op, int64_t bytes) {
  FARMS_CHECK(bytes >= 0, op, "memory_budget", "expected bytes, or 0 for the default, got ", bytes);
}

WindowTable read_window_table(const char* op, const std::vector<Tensor>& weights, const Tensor& table, int64_t order) {
  FARMS_CHECK(!weights.empty(), op, "weights", "expected at least one tensor, got none");
  FARMS_CHECK(order > 0, op, "order", "expected a positive order, got ", order);
  const Tensor& first = weights.front();
  for (size_t w = 0; w < weights.size(); ++w) {
    FARMS_CHECK(weights[w].dim() == 3, op, "weights", "expected stacks of 3 dimensions (entries, rows, columns), got ",
                weights[w].dim(), " dimensions at index ", w);
    FARMS_CHECK(weights[w].scalar_type() == first.scalar_type(), op, "weights", "expected one dtype, got ",
                torch::headeronly::toString(first.scalar_type()), " and ",
                torch::headeronly::toString(weights[w].scalar_type()));
    FARMS_CHECK(weights[w].is_cuda() == first.is_cuda() && weights[w].get_device_index() == first.get_device_index(),
                op, "weights", "expected one device, got another at index ", w);
  }
  FARMS_CHECK(table.dim() == 2 && table.size(1) == kWindowColumns && table.is_cpu() &&
                  table.scalar_type() == ScalarType::Long && table.is_contiguous(),
              op, "windows",
              "expected a contiguous int64 CPU tensor of shape (windows, 6), got another kind of tensor");

  WindowTable resolved{{}, weight_dtype(op, first.scalar_type())};
  // Asked for once a weight, not once a window: each of these is a call into torch.
  std::vector<Stack> stacks;
  for (const Tensor& weight : weights)
    stacks.push_back({static_cast<const char*>(weight.const_data_ptr()),
                      {weight.size(0), weight.size(1), weight.size(2)},
                      {weight.stride(0), weight.stride(1), weight.stride(2)}});
  const int64_t item = static_cast<int64_t>(item_size(resolved.dtype));
  const int64_t count = table.size(0);
  const int64_t* rows = table.const_data_ptr<int64_t>();
  resolved.windows.reserve(static_cast<size_t>(count));
  for (int64_t b = 0; b < count; ++b) {
    const int64_t* row = rows + b * kWindowColumns;
    FARMS_CHECK(row[0] >= 0 && row[0] < static_cast<int64_t>(stacks.size()), op, "windows",
                "expected a weight's index below ", stacks.size(), ", got ", row[0], " in row ", b);
    const Stack& stack = stacks[static_cast<size_t>(row[0])];
    const bool inside = row[1] >= 0 && row[1] < stack.size[0] && row[2] >= 0 && row[3] >= 0 && row[4] > 0 &&
                        row[5] > 0 && row[4] <= stack.size[1] - row[2] && row[5] <= stack.size[2] - row[3];
    FARMS_CHECK(inside, op, "windows", "expected a window inside a stack of shape (", stack.size[0], ", ",
                stack.size[1], ", ", stack.size[2], "), got entry ", row[1], ", row ", row[2], ", column ", row[3],
                ", size ", row[4], " x ", row[5], " in row ", b);
    FARMS_CHECK(std::min(row[4], row[5]) == order, op, "windows", "expected windows of order ", order,
                ", got one of size ", row[4], " x ", row[5], " in row ", b);
    resolved.windows.push_back({row[0], row[1], stack.data + item * row[1] * stack.stride[0], stack.stride[1],
                                stack.stride[2], row[2], row[3], row[4], row[5]});
  }
  return resolved;
}

}  // namespace farms_fast
