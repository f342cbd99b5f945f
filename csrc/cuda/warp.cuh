// The threads of a warp, and what they work out together by shuffles.
#pragma once

#include <cuda_runtime.h>

namespace farms_fast {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarpSize; }

// The sum, or the largest, of a warp's values, with the same bits in every lane.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}
template <typename Float>
__device__ __forceinline__ Float warp_max(Float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value = fmax(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

}  // namespace farms_fast
