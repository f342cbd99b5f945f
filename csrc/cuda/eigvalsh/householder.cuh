// Householder reflectors, H = I - tau v v^T with v's first element 1: H x = beta e_0 for x = (alpha, ...), and v is
// scale * x below its first element.
#pragma once

namespace farms_fast {

struct Reflector {
  double beta, tau, scale;
};

// norm2: of the whole of x, squared. Below this it is taken for zero: matrices come scaled to the middle of the
// exponent range, so what that drops is far below the last bit of the largest eigenvalue.
constexpr double kZeroNorm = 1e-280;

__device__ __forceinline__ Reflector make_reflector(double alpha, double norm2) {
  const bool zero = !(norm2 > kZeroNorm);
  const double square = zero ? 1.0 : norm2;
  const double inverse = rsqrt(square), norm = square * inverse;
  const double scale = 1.0 / (fabs(alpha) + norm);
  if (zero) return {0.0, 0.0, 0.0};
  return {alpha > 0 ? -norm : norm, 1.0 + fabs(alpha) * inverse, alpha > 0 ? scale : -scale};
}

}  // namespace farms_fast
