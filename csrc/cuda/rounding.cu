// Zero for eigenvalues that are zero but for rounding, in one launch.
#include "csrc/rounding.h"

#include <cfloat>

#include "csrc/cuda/check.h"

namespace farms_fast {
namespace {

constexpr int kThreads = 256;

// grid: (a thread for each value). evals, dropped: (total / order, order), each row ascending. Nobody waits for
// another.
template <typename Real>
__global__ void __launch_bounds__(kThreads)
    drop_rounding_kernel(const Real* __restrict__ evals, int64_t total, int64_t order, double share,
                         Real* __restrict__ dropped) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  dropped[i] = without_rounding(evals[i], evals[i / order * order + order - 1], share);
}

template <typename Real>
void launch(const void* evals, int64_t total, int64_t order, double eps, void* dropped, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((total + kThreads - 1) / kThreads);
  drop_rounding_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const Real*>(evals), total, order,
                                                        rounding_share(order, eps), static_cast<Real*>(dropped));
  FARMS_LAUNCH_CHECK();
}

}  // namespace

void drop_rounding_cuda(const void* evals, int64_t windows, int64_t order, DType dtype, void* dropped,
                        void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (dtype == DType::f64)
    launch<double>(evals, windows * order, order, DBL_EPSILON, dropped, stream);
  else
    launch<float>(evals, windows * order, order, FLT_EPSILON, dropped, stream);
}

}  // namespace farms_fast
