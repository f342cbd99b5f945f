// The op drop_rounding: zero for the eigenvalues that are zero but for rounding.
#include "csrc/drop_rounding.h"

#include <torch/csrc/stable/library.h>

#include <limits>

#include "csrc/allocate.h"
#include "csrc/op_check.h"
#include "csrc/rounding.h"

namespace farms_fast {

DropRoundingCall check_drop_rounding(const Tensor& evals) {
  const char* op = "drop_rounding";
  const ScalarType type = evals.scalar_type();
  FARMS_CHECK(evals.dim() == 2 && evals.is_contiguous() && (type == ScalarType::Double || type == ScalarType::Float),
              op, "evals", "expected a contiguous float32 or float64 tensor of shape (windows, order), got ",
              torch::headeronly::toString(type), " of ", evals.dim(), " dimensions");
  const int64_t windows = evals.size(0), order = evals.size(1);
  return {windows, order, type == ScalarType::Double ? DType::f64 : DType::f32,
          allocate({windows, order}, type, evals.device())};
}

namespace {

template <typename Real>
void drop(const void* evals, const DropRoundingCall& call) {
  const Real* from = static_cast<const Real*>(evals);
  Real* to = static_cast<Real*>(call.dropped.mutable_data_ptr());
  const double share = rounding_share(call.order, std::numeric_limits<Real>::epsilon());
  for (int64_t w = 0; w < call.windows; ++w, from += call.order, to += call.order)
    for (int64_t i = 0; i < call.order; ++i) to[i] = without_rounding(from[i], from[call.order - 1], share);
}

Tensor drop_rounding(Tensor evals) {
  const DropRoundingCall call = check_drop_rounding(evals);
  if (call.dtype == DType::f64)
    drop<double>(evals.const_data_ptr(), call);
  else
    drop<float>(evals.const_data_ptr(), call);
  return call.dropped;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_FRAGMENT(farms_fast, m) { m.def("drop_rounding(Tensor evals) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CPU, m) { m.impl("drop_rounding", TORCH_BOX(&farms_fast::drop_rounding)); }
