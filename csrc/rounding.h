// Eigenvalues that are zero but for rounding. Kept free of torch, for kernel files.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"
#include "csrc/host_device.h"

namespace farms_fast {

// What eigenvalues of a Gram matrix of an order may err by, over the largest. Every solver keeps within it, so that up
// to here nothing is known of an eigenvalue but that it may be zero.
constexpr double rounding_share(int64_t order, double eps) { return 8.0 * static_cast<double>(order) * eps; }

// `share`: of rounding_share. Where the largest is not finite nothing is known, and every value stays.
template <typename Real>
FARMS_FAST_HOST_DEVICE Real without_rounding(Real value, Real largest, double share) {
  const double limit = share * static_cast<double>(largest);
  return limit <= 1.7976931348623157e308 && static_cast<double>(value) <= limit ? Real(0) : value;
}

// evals, dropped: (windows, order) in device memory, of `dtype`, float32 or float64, each row ascending. `stream`: a
// cudaStream_t.
void drop_rounding_cuda(const void* evals, int64_t windows, int64_t order, DType dtype, void* dropped, void* stream);

}  // namespace farms_fast
