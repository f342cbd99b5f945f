// The op fit_power_law on every device: arguments checked, results allocated.
#pragma once

#include <cstdint>
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
                            int64_t bins, bool log10_lower_bound);

}  // namespace farms_fast
