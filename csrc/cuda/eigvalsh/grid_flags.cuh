// How blocks of one grid wait for each other without a cluster: by flags in global memory. The launch is a cooperative
// one, so that all blocks run at the same time and whoever is waited for goes on.
#pragma once

#include <cuda_runtime.h>

#include "csrc/cuda/check.h"

namespace farms_fast {

// What the writer of a flag wrote before, with a fence in between, is there once its value is (PTX ISA, "ld.acquire").
__device__ __forceinline__ int grid_flag(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void grid_store(int* flag, int value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;\n" ::"l"(flag), "r"(value) : "memory");
}

// Every flag to -1, which comes before all that is told.
inline void clear_flags(int* flags, int64_t count, cudaStream_t stream) {
  FARMS_CUDA_CHECK(cudaMemsetAsync(flags, 0xff, count * sizeof(int), stream));
}

}  // namespace farms_fast
