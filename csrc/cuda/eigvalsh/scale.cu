#include "csrc/cuda/eigvalsh/scale.h"

#include <algorithm>
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

// What a magnitude counts as: as whole numbers they keep their order, infinity comes after them and NaN last. So the
// largest of all blocks does not depend on which of them comes first.
__device__ __forceinline__ unsigned long long magnitude_bits(double value) {
  return static_cast<unsigned long long>(__double_as_longlong(fabs(value)));
}
__device__ __forceinline__ unsigned long long magnitude_bits(float value) {
  return static_cast<unsigned>(__float_as_int(fabsf(value)));
}
template <typename Real>
__device__ __forceinline__ int exponent_of(unsigned long long largest_bits) {
  Real largest;
  if constexpr (sizeof(Real) == 8)
    largest = __longlong_as_double(static_cast<long long>(largest_bits));
  else
    largest = __int_as_float(static_cast<int>(largest_bits));
  if (!isfinite(largest)) return kNonfiniteScale;
  const int exponent = largest > 0 ? ilogb(largest) : 0;
  return abs(exponent) <= kNeutralExponent<Real> ? 0 : exponent;
}

// grid: (blocks of a matrix, matrices). Shapes as in scale.h; complex matrices are read as twice as many reals.
// largest: (batch,), zero.
template <typename Real>
__global__ void __launch_bounds__(kScaleThreads)
    largest_kernel(const Real* __restrict__ gram, int64_t reals_per_matrix, unsigned long long* __restrict__ largest) {
  __shared__ unsigned long long of_warp[kScaleThreads / 32];
  const Real* matrix = gram + blockIdx.y * reals_per_matrix;
  unsigned long long bits = 0;
  for (int64_t i = blockIdx.x * kScaleThreads + threadIdx.x; i < reals_per_matrix;
       i += static_cast<int64_t>(gridDim.x) * kScaleThreads)
    bits = max(bits, magnitude_bits(matrix[i]));
  for (int offset = 16; offset > 0; offset /= 2) bits = max(bits, __shfl_xor_sync(kAllLanes, bits, offset));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = bits;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (const unsigned long long other : of_warp) bits = max(bits, other);
  atomicMax(largest + blockIdx.y, bits);
}

// grid: (blocks of a matrix, matrices).
template <typename Real>
__global__ void __launch_bounds__(kScaleThreads)
    scale_gram_kernel(Real* __restrict__ gram, int64_t reals_per_matrix, const unsigned long long* __restrict__ largest,
                      int* __restrict__ exponents) {
  Real* matrix = gram + blockIdx.y * reals_per_matrix;
  const int exponent = exponent_of<Real>(largest[blockIdx.y]);
  if (blockIdx.x == 0 && threadIdx.x == 0) exponents[blockIdx.y] = exponent;
  if (exponent == 0) return;
  for (int64_t i = blockIdx.x * kScaleThreads + threadIdx.x; i < reals_per_matrix;
       i += static_cast<int64_t>(gridDim.x) * kScaleThreads)
    matrix[i] = exponent == kNonfiniteScale ? Real(0) : scalbn(matrix[i], -exponent);
}

template <typename Real>
void scale(void* gram, int64_t batch, int64_t reals, unsigned long long* largest, int* exponents, cudaStream_t stream) {
  // Few matrices are read by several blocks each.
  constexpr int64_t reals_per_block = 16 * kScaleThreads, busy_blocks = 1024;
  const int64_t useful = (reals + reals_per_block - 1) / reals_per_block;
  const int64_t blocks = std::min(useful, std::max<int64_t>(1, busy_blocks / batch));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
  Real* matrices = static_cast<Real*>(gram);
  FARMS_CUDA_CHECK(cudaMemsetAsync(largest, 0, batch * sizeof(*largest), stream));
  largest_kernel<<<grid, kScaleThreads, 0, stream>>>(matrices, reals, largest);
  FARMS_LAUNCH_CHECK();
  scale_gram_kernel<<<grid, kScaleThreads, 0, stream>>>(matrices, reals, largest, exponents);
  FARMS_LAUNCH_CHECK();
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

void scale_gram(void* gram, int64_t batch, int64_t order, DType dtype, unsigned long long* largest, int* exponents,
                cudaStream_t stream) {
  const int64_t reals = order * order * (is_complex(dtype) ? 2 : 1);
  if (is_double(dtype))
    scale<double>(gram, batch, reals, largest, exponents, stream);
  else
    scale<float>(gram, batch, reals, largest, exponents, stream);
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
