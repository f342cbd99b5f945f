// The op drop_rounding on CUDA.
#include "csrc/drop_rounding.h"

#include <torch/csrc/stable/library.h>

#include "csrc/cuda/context.h"
#include "csrc/rounding.h"

namespace farms_fast {
namespace {

Tensor drop_rounding(Tensor evals) {
  const DropRoundingCall call = check_drop_rounding(evals);
  if (evals.numel() == 0) return call.dropped;
  const CudaContext context(evals);
  drop_rounding_cuda(evals.const_data_ptr(), call.windows, call.order, call.dtype, call.dropped.mutable_data_ptr(),
                     context.stream());
  return call.dropped;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CUDA, m) { m.impl("drop_rounding", TORCH_BOX(&farms_fast::drop_rounding)); }
