// The op window_eigvalsh: eigenvalues of the windows' Gram matrices, of which few are in memory at a time.
#include <torch/csrc/stable/library.h>

#include <string>

#include "csrc/allocate.h"
#include "csrc/cpu/cpu_eigvalsh.h"
#include "csrc/eigvalsh.h"

namespace farms_fast {

WindowEigvalshCall check_window_eigvalsh(const std::vector<Tensor>& weights, const Tensor& windows, int64_t order,
                                         ScalarType dtype, int64_t memory_budget) {
  const char* op = "window_eigvalsh";
  check_memory_budget(op, memory_budget);
  const DType precision = precision_of(op, dtype);
  WindowTable table = read_window_table(op, weights, windows, order);
  Tensor evals = allocate({table.count(), order}, dtype, weights.front().device());
  return {std::move(table), precision, std::move(evals)};
}

namespace {

Tensor window_eigvalsh(std::vector<Tensor> weights, Tensor windows, int64_t order, ScalarType dtype, std::string solver,
                       int64_t memory_budget) {
  const WindowEigvalshCall call = check_window_eigvalsh(weights, windows, order, dtype, memory_budget);
  const CpuSolver chosen = cpu_solver("window_eigvalsh", solver, call.gram(), order);
  if (call.table.count() > 0)
    window_eigvalsh_cpu(call.table.windows.data(), call.table.count(), order, call.table.dtype, call.precision, chosen,
                        memory_budget, call.evals.mutable_data_ptr());
  return call.evals;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_FRAGMENT(farms_fast, m) {
  m.def(
      "window_eigvalsh(Tensor[] weights, Tensor windows, int order, ScalarType dtype, str solver, int memory_budget) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CPU, m) { m.impl("window_eigvalsh", TORCH_BOX(&farms_fast::window_eigvalsh)); }
