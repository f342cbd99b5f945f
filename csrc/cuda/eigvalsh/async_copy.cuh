// Copies from global to shared memory that run beside the arithmetic, and thread-block clusters: the few instructions
// of the band reduction that CUDA C++ has no plain syntax for. Architectures without them get plain copies, and blocks
// that are clusters of their own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace farms_fast {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One double, or two with both sides aligned to 16 bytes; zero where `valid` is false, and the source is then not read.
template <int Doubles>
__device__ __forceinline__ void copy_async(double* shared, const double* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = shared_address(shared);
  if constexpr (Doubles == 1)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 8 : 0)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#else
  for (int i = 0; i < Doubles; ++i) shared[i] = valid ? __ldcg(global + i) : 0.0;
#endif
}

__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Until at most `Pending` of this thread's groups are still under way.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#else
  __syncthreads();
#endif
}

// Writes to the same place in another block's shared memory.
__device__ __forceinline__ void cluster_store(double* shared, int rank, double value) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("st.shared::cluster.f64 [%0], %1;\n" ::"r"(address), "d"(value) : "memory");
#else
  if (rank == 0) *shared = value;
#endif
}

}  // namespace farms_fast
