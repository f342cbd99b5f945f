// Which CUDA solver "auto" stands for by measurement: a table for each architecture that was measured.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace farms_fast {

enum class Field { real, complex };

// Rows of a field go by order, then by batch; the first one that holds both counts.
struct ChoiceRow {
  Field field;
  int64_t up_to_order;
  int64_t up_to_batch;
  const char* solver;

  constexpr bool holds(int64_t count, int64_t order, DType gram) const {
    return field == (is_complex(gram) ? Field::complex : Field::real) && order <= up_to_order && count <= up_to_batch;
  }
};

struct MeasuredChoice {
  int architecture;  // 10 * major + minor
  ChoiceRow row;
};

constexpr MeasuredChoice kMeasuredChoices[] = {
#include "csrc/host/measured_choice.inc"
};

// Null where no row holds such matrices.
inline const char* measured_choice(int architecture, int64_t count, int64_t order, DType gram) {
  for (const MeasuredChoice& measured : kMeasuredChoices)
    if (measured.architecture == architecture && measured.row.holds(count, order, gram)) return measured.row.solver;
  return nullptr;
}

}  // namespace farms_fast
