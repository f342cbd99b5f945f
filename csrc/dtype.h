// Element types of the kernels. Kept free of torch so that a kernel file compiles in seconds and without torch's
// headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace farms_fast {

enum class DType : int32_t { f16, bf16, f32, f64, c64, c128 };

constexpr bool is_complex(DType dtype) { return dtype == DType::c64 || dtype == DType::c128; }

constexpr bool is_double(DType dtype) { return dtype == DType::f64 || dtype == DType::c128; }

constexpr size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f32:
      return 4;
    case DType::f64:
    case DType::c64:
      return 8;
    case DType::c128:
      return 16;
  }
  return 0;
}

// The Gram matrix's element type for a weight's type and a real precision (f32 or f64).
constexpr DType gram_dtype(DType weight, DType precision) {
  if (!is_complex(weight)) return precision;
  return precision == DType::f64 ? DType::c128 : DType::c64;
}

// The eigenvalues' element type for a Gram matrix's.
constexpr DType real_dtype(DType gram) {
  switch (gram) {
    case DType::c64:
      return DType::f32;
    case DType::c128:
      return DType::f64;
    default:
      return gram;
  }
}

}  // namespace farms_fast
