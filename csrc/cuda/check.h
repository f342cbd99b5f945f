// Every CUDA call's return code goes through one of these.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/op_check.h"

#define FARMS_CUDA_CHECK(call)                                                                        \
  do {                                                                                                \
    const cudaError_t error_ = (call);                                                                \
    if (error_ != cudaSuccess) ::farms_fast::fail("cuda: ", #call, ": ", cudaGetErrorString(error_)); \
  } while (false)

#define FARMS_LAUNCH_CHECK() FARMS_CUDA_CHECK(cudaGetLastError())
