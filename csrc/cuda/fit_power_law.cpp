// The op fit_power_law on CUDA.
#include "csrc/fit_power_law.h"

#include <torch/csrc/stable/library.h>

#include "csrc/cuda/context.h"

namespace farms_fast {
namespace {

FitTensors fit_power_law(Tensor evals, Tensor offsets, std::string rule, double xmin_pos, int64_t bins, bool published,
                         std::optional<Tensor> least_spread) {
  const FitCall call = check_fit_power_law(evals, offsets, rule, xmin_pos, bins, published, least_spread);
  if (call.spectra == 0) return call.fits;
  const CudaContext context(evals);
  const Tensor workspace =
      context.bytes(static_cast<int64_t>(fit_power_law_cuda_workspace_bytes(evals.numel(), call.spectra)));
  const int error = fit_power_law_cuda(evals.const_data_ptr<double>(), offsets.const_data_ptr<int64_t>(),
                                       spread_data(least_spread), evals.numel(), call.spectra, call.settings,
                                       call.outputs(), workspace.mutable_data_ptr(), context.stream());
  if (error != 0) fail("fit_power_law: CUDA error ", error, " at launch");
  return call.fits;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CUDA, m) { m.impl("fit_power_law", TORCH_BOX(&farms_fast::fit_power_law)); }
