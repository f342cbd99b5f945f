// The op window_gram: Gram matrices of windows that are read in place.
#include "csrc/window_gram.h"

#include <torch/csrc/stable/library.h>

#include "csrc/allocate.h"

namespace farms_fast {

WindowGramCall check_window_gram(const std::vector<Tensor>& weights, const Tensor& windows, int64_t order,
                                 ScalarType dtype) {
  const char* op = "window_gram";
  const DType precision = precision_of(op, dtype);
  WindowTable table = read_window_table(op, weights, windows, order);
  const ScalarType element = scalar_type(gram_dtype(table.dtype, precision));
  Tensor gram = allocate({table.count(), order, order}, element, weights.front().device());
  return {std::move(table), precision, std::move(gram)};
}

namespace {

Tensor window_gram(std::vector<Tensor> weights, Tensor windows, int64_t order, ScalarType dtype) {
  const WindowGramCall call = check_window_gram(weights, windows, order, dtype);
  if (call.table.count() > 0)
    window_gram_cpu(call.table.windows.data(), call.table.count(), order, call.table.dtype, call.precision,
                    call.gram.mutable_data_ptr());
  return call.gram;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_FRAGMENT(farms_fast, m) {
  m.def("window_gram(Tensor[] weights, Tensor windows, int order, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CPU, m) { m.impl("window_gram", TORCH_BOX(&farms_fast::window_gram)); }
