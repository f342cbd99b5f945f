// A launch of a kernel whose blocks wait for each other: in clusters of blocks that follow each other in the grid's
// first dimension, or where there are none as one grid that runs at the same time. A cluster of one block is an
// ordinary launch, which any architecture takes.
#pragma once

#include <cuda_runtime.h>

#include "csrc/cuda/check.h"

namespace farms_fast {

struct ClusterLaunch {
  cudaLaunchConfig_t config = {};

  template <typename... Parameters>
  ClusterLaunch(void (*kernel)(Parameters...), dim3 grid, unsigned cluster, unsigned threads, size_t shared_bytes,
                cudaStream_t stream) {
    // What a block gets without asking.
    constexpr size_t granted = 48 << 10;
    if (shared_bytes > granted)
      FARMS_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {cluster, 1, 1};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute_;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  // All blocks of the grid run at the same time, instead of those of a cluster.
  void run_grid_at_once() {
    attribute_.id = cudaLaunchAttributeCooperative;
    attribute_.val.cooperative = 1;
    config.numAttrs = 1;
  }

 private:
  cudaLaunchAttribute attribute_ = {};
};

}  // namespace farms_fast
