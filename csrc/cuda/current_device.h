// The current CUDA device, as far as it decides which solvers run.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/cuda/check.h"
#include "csrc/host/cuda_solvers.h"

namespace farms_fast {

inline CudaDevice current_device() {
  int device = 0, major = 0, minor = 0, shared_bytes = 0, clusters = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  return {10 * major + minor, shared_bytes, clusters != 0};
}

}  // namespace farms_fast
