// Which CUDA solver "auto" stands for by measurement: a table for each architecture that was measured.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace farms_fast {

enum class Field { real, complex };

// The rows of an architecture and a field go by order, then by batch; the first one that holds both counts.
struct MeasuredChoice {
  int architecture;  // 10 * major + minor
  Field field;
  int64_t up_to_order;
  int64_t up_to_batch;
  const char* solver;
};

constexpr MeasuredChoice kMeasuredChoices[] = {
#include "csrc/host/measured_choice.inc"
};

// Null where no row holds such matrices.
inline const char* measured_choice(int architecture, int64_t count, int64_t order, DType gram) {
  const Field field = is_complex(gram) ? Field::complex : Field::real;
  for (const MeasuredChoice& row : kMeasuredChoices)
    if (row.architecture == architecture && row.field == field && order <= row.up_to_order && count <= row.up_to_batch)
      return row.solver;
  return nullptr;
}

}  // namespace farms_fast
