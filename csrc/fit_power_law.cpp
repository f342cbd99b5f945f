// The op fit_power_law: power-law fits of the tails of many spectra.
#include "csrc/fit_power_law.h"

#include <torch/csrc/stable/library.h>

#include "csrc/allocate.h"
#include "csrc/op_check.h"

namespace farms_fast {
namespace {

XminRule xmin_rule(const std::string& rule) {
  if (rule == "median") return XminRule::median;
  if (rule == "ks") return XminRule::ks;
  FARMS_CHECK(rule == "peak", "fit_power_law", "rule", "expected one of median, ks, peak, got ", rule);
  return XminRule::peak;
}

}  // namespace

FitOutputs FitCall::outputs() const {
  return {std::get<0>(fits).mutable_data_ptr<double>(),  std::get<1>(fits).mutable_data_ptr<double>(),
          std::get<2>(fits).mutable_data_ptr<double>(),  std::get<3>(fits).mutable_data_ptr<int64_t>(),
          std::get<4>(fits).mutable_data_ptr<int64_t>(), std::get<5>(fits).mutable_data_ptr<int64_t>()};
}

FitCall check_fit_power_law(const Tensor& evals, const Tensor& offsets, const std::string& rule, double xmin_pos,
                            int64_t bins, bool published, const std::optional<Tensor>& least_spread) {
  const char* op = "fit_power_law";
  const FitSettings settings{xmin_rule(rule), xmin_pos, bins, published};
  FARMS_CHECK(evals.dim() == 1 && evals.is_contiguous() && evals.scalar_type() == ScalarType::Double, op, "evals",
              "expected a contiguous float64 tensor of one dimension, got ",
              torch::headeronly::toString(evals.scalar_type()), " of ", evals.dim(), " dimensions");
  FARMS_CHECK(
      offsets.dim() == 1 && offsets.numel() > 0 && offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long,
      op, "offsets", "expected a contiguous int64 tensor of shape (spectra + 1,), got ",
      torch::headeronly::toString(offsets.scalar_type()), " of ", offsets.dim(), " dimensions");
  FARMS_CHECK(offsets.is_cuda() == evals.is_cuda() && offsets.get_device_index() == evals.get_device_index(), op,
              "offsets", "expected the device of evals, got another");
  FARMS_CHECK(xmin_pos > 1 && xmin_pos < 1e300, op, "xmin_pos", "expected a finite number above 1, got ", xmin_pos);
  FARMS_CHECK(bins >= 1, op, "bins", "expected at least 1, got ", bins);
  const int64_t spectra = offsets.numel() - 1;
  if (least_spread.has_value()) {
    FARMS_CHECK(least_spread->dim() == 1 && least_spread->numel() == spectra && least_spread->is_contiguous() &&
                    least_spread->scalar_type() == ScalarType::Double,
                op, "least_spread", "expected a contiguous float64 tensor of shape (", spectra, ",), got ",
                torch::headeronly::toString(least_spread->scalar_type()), " of ", least_spread->numel(), " values");
    FARMS_CHECK(
        least_spread->is_cuda() == evals.is_cuda() && least_spread->get_device_index() == evals.get_device_index(), op,
        "least_spread", "expected the device of evals, got another");
  }
  const auto doubles = [&] { return allocate({spectra}, ScalarType::Double, evals.device()); };
  const auto longs = [&] { return allocate({spectra}, ScalarType::Long, evals.device()); };
  return {settings, spectra, {doubles(), doubles(), doubles(), longs(), longs(), longs()}};
}

namespace {

FitTensors fit_power_law(Tensor evals, Tensor offsets, std::string rule, double xmin_pos, int64_t bins, bool published,
                         std::optional<Tensor> least_spread) {
  const FitCall call = check_fit_power_law(evals, offsets, rule, xmin_pos, bins, published, least_spread);
  if (call.spectra == 0) return call.fits;
  // On CUDA the offsets are in device memory, where reading them would make the host wait.
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  bool ascending = bounds[0] >= 0 && bounds[call.spectra] <= evals.numel();
  for (int64_t s = 0; s < call.spectra; ++s) ascending = ascending && bounds[s] <= bounds[s + 1];
  FARMS_CHECK(ascending, "fit_power_law", "offsets", "expected ascending offsets within ", evals.numel(),
              " values, got others");
  fit_power_law_cpu(evals.const_data_ptr<double>(), bounds, spread_data(least_spread), call.spectra, call.settings,
                    call.outputs());
  return call.fits;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_FRAGMENT(farms_fast, m) {
  m.def(
      "fit_power_law(Tensor evals, Tensor offsets, str rule, float xmin_pos, int bins, bool published, "
      "Tensor? least_spread=None) -> (Tensor alpha, Tensor D, Tensor xmin, Tensor n_tail, Tensor status, Tensor "
      "dropped)");
}

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CPU, m) { m.impl("fit_power_law", TORCH_BOX(&farms_fast::fit_power_law)); }
