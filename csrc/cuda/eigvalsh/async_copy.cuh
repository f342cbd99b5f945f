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

// By addresses of shared memory. Of a generic pointer the compiler works out the base again in every step of a loop.
__device__ __forceinline__ double load_shared(uint32_t address) {
  double value;
  asm volatile("ld.shared.f64 %0, [%1];\n" : "=d"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_shared(uint32_t address, double value) {
  asm volatile("st.shared.f64 [%0], %1;\n" ::"r"(address), "d"(value) : "memory");
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
__device__ __forceinline__ void cluster_store(int* shared, int rank, int value) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("st.relaxed.cluster.shared::cluster.s32 [%0], %1;\n" ::"r"(address), "r"(value) : "memory");
#else
  if (rank == 0) *const_cast<volatile int*>(shared) = value;
#endif
}

// A flag of this block that another one of the cluster sets by cluster_store: what that one wrote before, with a fence
// in between, is there afterwards.
__device__ __forceinline__ int cluster_flag(const int* shared) {
  int value;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.acquire.cluster.shared::cta.s32 %0, [%1];\n" : "=r"(value) : "r"(shared_address(shared)) : "memory");
#else
  value = *const_cast<const volatile int*>(shared);
  __threadfence();
#endif
  return value;
}

// A barrier in shared memory whose phases end when the bytes that its block expects have been sent to it. `parity`: of
// the phases since the beginning, 0 first.
__device__ __forceinline__ void phase_init(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\n" ::"r"(shared_address(barrier))
      : "memory");
#endif
}
__device__ __forceinline__ void phase_expect(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void phase_wait(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
}
// Writes to the same place in another block's shared memory, 8 bytes towards that block's barrier.
__device__ __forceinline__ void phase_send(double* shared, uint64_t* barrier, int rank, double value) {
#if __CUDA_ARCH__ >= 900
  uint32_t address, at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(at) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];\n" ::"r"(address),
               "l"(__double_as_longlong(value)), "r"(at)
               : "memory");
#else
  if (rank == 0) *shared = value;
#endif
}

}  // namespace farms_fast
