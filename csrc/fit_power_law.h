// The op fit_power_law on every device: arguments checked, results allocated.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "csrc/op_arguments.h"
#include "csrc/power_law.h"

namespace farms_fast {

// alpha, D, xmin, n_tail, status, dropped: (spectra,) each.
using FitTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct FitCall {
  FitSettings settings;
  int64_t spectra;
  FitTensors fits;  // to be written

  FitOutputs outputs() const;
};

FitCall check_fit_power_law(const Tensor& evals, const Tensor& offsets, const std::string& rule, double xmin_pos,
                            int64_t bins, bool published, const std::optional<Tensor>& least_spread);

// Null where there is none.
inline const double* spread_data(const std::optional<Tensor>& least_spread) {
  return least_spread.has_value() ? least_spread->const_data_ptr<double>() : nullptr;
}

}  // namespace farms_fast
