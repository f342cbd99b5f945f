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

// To about an ulp, for positive x neither so small nor so large that x or the result is not a normal number: that case
// is what rsqrt() and the division branch for. One iteration of the third order from the hardware's first 20 bits.
__device__ __forceinline__ double fast_rsqrt(double x) {
#ifdef __CUDA_ARCH__
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double error = fma(-x * y, y, 1.0);
  return fma(fma(0.375, error, 0.5), y * error, y);
#else
  return rsqrt(x);
#endif
}
__device__ __forceinline__ double fast_reciprocal(double x) {
#ifdef __CUDA_ARCH__
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double error = fma(-x, y, 1.0);
  return fma(y, fma(error, error, error), y);
#else
  return 1.0 / x;
#endif
}

__device__ __forceinline__ Reflector make_reflector(double alpha, double norm2) {
  const bool zero = !(norm2 > kZeroNorm);
  const double square = zero ? 1.0 : norm2;
  const double inverse = fast_rsqrt(square), norm = square * inverse;
  const double scale = fast_reciprocal(fabs(alpha) + norm);
  if (zero) return {0.0, 0.0, 0.0};
  return {alpha > 0 ? -norm : norm, 1.0 + fabs(alpha) * inverse, alpha > 0 ? scale : -scale};
}

}  // namespace farms_fast
