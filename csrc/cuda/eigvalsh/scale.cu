#include "csrc/cuda/eigvalsh/scale.h"

#include <climits>
#include <cmath>

#include "csrc/cuda/check.h"
#include "csrc/cuda/warp.cuh"

namespace farms_fast {
namespace {

constexpr int kNonfiniteScale = INT_MAX;
constexpr int kScaleThreads = 512;

// Magnitudes within 2^±128 (2^±32 in float32) are left alone: squares and products of them are far from either end.
template <typename Real>
constexpr int kNeutralExponent = sizeof(Real) == 8 ? 128 : 32;

// grid: (matrices). Shapes as in scale.h; complex matrices are read as twice as many reals.
template <typename Real>
__global__ void __launch_bounds__(kScaleThreads)
    scale_gram_kernel(Real* __restrict__ gram, int64_t reals_per_matrix, int* __restrict__ exponents) {
  __shared__ Real block_largest[kScaleThreads / 32];
  __shared__ int exponent;
  Real* matrix = gram + blockIdx.x * reals_per_matrix;
  Real largest = 0;
  bool finite = true;
  for (int64_t i = threadIdx.x; i < reals_per_matrix; i += kScaleThreads) {
    const Real magnitude = fabs(matrix[i]);
    finite = finite && isfinite(magnitude);
    largest = fmax(largest, magnitude);
  }
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) block_largest[threadIdx.x / 32] = largest;
  const bool all_finite = __syncthreads_and(finite);
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kScaleThreads / 32; ++warp) largest = fmax(largest, block_largest[warp]);
    int e = largest > 0 ? ilogb(largest) : 0;
    if (abs(e) <= kNeutralExponent<Real>) e = 0;
    exponent = all_finite ? e : kNonfiniteScale;
    exponents[blockIdx.x] = exponent;
  }
  __syncthreads();
  if (exponent == 0) return;
  for (int64_t i = threadIdx.x; i < reals_per_matrix; i += kScaleThreads)
    matrix[i] = exponent == kNonfiniteScale ? Real(0) : scalbn(matrix[i], -exponent);
}

template <typename Real>
__global__ void unscale_kernel(Real* __restrict__ evals, int64_t batch, int64_t order,
                               const int* __restrict__ exponents, const int* __restrict__ failed, bool clip) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= batch * order) return;
  const int exponent = exponents[i / order];
  Real value = scalbn(evals[i], exponent == kNonfiniteScale ? 0 : exponent);
  if (clip && value < 0) value = 0;
  if (exponent == kNonfiniteScale || failed[i / order] != 0) value = nan("");
  evals[i] = value;
}

}  // namespace

void scale_gram(void* gram, int64_t batch, int64_t order, DType dtype, int* exponents, cudaStream_t stream) {
  const int64_t reals = order * order * (is_complex(dtype) ? 2 : 1);
  const unsigned grid = static_cast<unsigned>(batch);
  if (is_double(dtype))
    scale_gram_kernel<<<grid, kScaleThreads, 0, stream>>>(static_cast<double*>(gram), reals, exponents);
  else
    scale_gram_kernel<<<grid, kScaleThreads, 0, stream>>>(static_cast<float*>(gram), reals, exponents);
  FARMS_LAUNCH_CHECK();
}

void unscale_eigenvalues(void* evals, int64_t batch, int64_t order, DType dtype, const int* exponents,
                         const int* failed, bool clip, cudaStream_t stream) {
  constexpr int threads = 256;
  const unsigned grid = static_cast<unsigned>((batch * order + threads - 1) / threads);
  if (is_double(dtype))
    unscale_kernel<<<grid, threads, 0, stream>>>(static_cast<double*>(evals), batch, order, exponents, failed, clip);
  else
    unscale_kernel<<<grid, threads, 0, stream>>>(static_cast<float*>(evals), batch, order, exponents, failed, clip);
  FARMS_LAUNCH_CHECK();
}

}  // namespace farms_fast
