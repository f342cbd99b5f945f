// The op eigvalsh: eigenvalues of a batch of symmetric or Hermitian matrices.
#include "csrc/eigvalsh.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "csrc/allocate.h"
#include "csrc/cpu/cpu_eigvalsh.h"
#include "csrc/op_check.h"

namespace farms_fast {

EigvalshCall check_eigvalsh(const Tensor& gram, int64_t memory_budget) {
  const char* op = "eigvalsh";
  FARMS_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2), op, "gram",
              "expected a batch of square matrices (batch, order, order), got ", gram.dim(), " dimensions",
              gram.dim() == 3 ? " that are not square" : "");
  FARMS_CHECK(gram.is_contiguous(), op, "gram", "expected a contiguous tensor, got strides");
  check_memory_budget(op, memory_budget);
  const DType dtype = gram_matrix_dtype(op, "gram", gram.scalar_type());
  return {dtype, allocate({gram.size(0), gram.size(1)}, scalar_type(real_dtype(dtype)), gram.device())};
}

namespace {

Tensor eigvalsh(Tensor gram, std::string solver, int64_t memory_budget) {
  const EigvalshCall call = check_eigvalsh(gram, memory_budget);
  const int64_t count = gram.size(0), order = gram.size(1);
  const CpuSolver chosen = cpu_solver("eigvalsh", solver, call.dtype, order);
  if (call.evals.numel() > 0)
    eigvalsh_cpu(gram.const_data_ptr(), count, order, call.dtype, chosen, memory_budget, call.evals.mutable_data_ptr());
  return call.evals;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_FRAGMENT(farms_fast, m) {
  m.def("eigvalsh(Tensor gram, str solver, int memory_budget) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CPU, m) { m.impl("eigvalsh", TORCH_BOX(&farms_fast::eigvalsh)); }
