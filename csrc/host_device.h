// Marks functions that the host and, in CUDA files, the device compile.
#pragma once

#if defined(__CUDACC__)
#define FARMS_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FARMS_FAST_HOST_DEVICE inline
#endif
