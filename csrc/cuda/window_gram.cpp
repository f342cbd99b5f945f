// The op window_gram on CUDA.
#include "csrc/window_gram.h"

#include <torch/csrc/stable/library.h>

#include "csrc/cuda/context.h"
#include "csrc/cuda/shared_gram.h"

namespace farms_fast {
namespace {

Tensor window_gram(std::vector<Tensor> weights, Tensor windows, int64_t order, ScalarType dtype) {
  const WindowGramCall call = check_window_gram(weights, windows, order, dtype);
  const WindowTable& table = call.table;
  if (table.count() == 0) return call.gram;
  const CudaContext context(call.gram);
  // Sharing may take as much memory again as the result.
  const int64_t memory = call.gram.numel() * static_cast<int64_t>(item_size(gram_dtype(table.dtype, call.precision)));
  const GramPlan plan =
      plan_grams_cuda(table.windows.data(), table.count(), table.dtype, /*either_side=*/false, memory);
  const Tensor workspace = context.bytes(plan.workspace_bytes());
  form_grams_cuda(plan, order, table.dtype, call.precision, workspace.mutable_data_ptr(), call.gram.mutable_data_ptr(),
                  context.stream());
  return call.gram;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CUDA, m) { m.impl("window_gram", TORCH_BOX(&farms_fast::window_gram)); }
