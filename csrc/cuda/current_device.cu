#include "csrc/cuda/current_device.h"

#include <algorithm>

#include "csrc/cuda/check.h"

namespace farms_fast {
namespace {

// What the kernels were compiled for tells it of itself.
__global__ void architecture_kernel() {}

CudaDevice device_facts(int device) {
  int major = 0, minor = 0, shared_bytes = 0, clusters = 0, processors = 0;
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  cudaFuncAttributes code = {};
  FARMS_CUDA_CHECK(cudaFuncGetAttributes(&code, architecture_kernel));
  // The PTX version is that of the source, whatever it was translated to when it was loaded.
  const CudaDevice built_for = cuda_device(std::min(10 * major + minor, code.ptxVersion));
  return {built_for.architecture, std::min<int64_t>(shared_bytes, built_for.shared_bytes),
          clusters != 0 ? built_for.cluster_blocks : 1, processors, device};
}

}  // namespace

CudaDevice current_device() {
  static thread_local int known_device = -1;
  static thread_local CudaDevice known;
  int device = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  if (device != known_device) {
    known = device_facts(device);
    known_device = device;
  }
  return known;
}

}  // namespace farms_fast
