// What the blocks of a cluster tell each other through their shared memory: by plain stores, by flags, and by stores
// that count themselves at a barrier of the receiver, which then waits for what it needs and for nothing else. Before
// Hopper a cluster is one block.
//
// All blocks of a cluster run at the same time, so a wait ends when the sender comes to what it sends; a sender's
// memory is there until the cluster's last barrier. The PTX is written out because neither cooperative_groups nor
// cuda::ptx has all of it, and what they have compiles to other machine code in these kernels: this_cluster().sync() is
// not .aligned, block_rank() and mbarrier_init() come out in another order, mbarrier_try_wait_parity() in another loop.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/cuda/eigvalsh/async_copy.cuh"

namespace farms_fast {

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

// Another block's shared memory, at the offset that `shared` has in this one's.
__device__ __forceinline__ uint32_t cluster_address(const void* shared, int rank) {
  uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
#endif
  return address;
}

// Writes at the same offset in another block's shared memory; an int is a flag, see cluster_flag.
__device__ __forceinline__ void cluster_store(double* shared, int rank, double value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f64 [%0], %1;\n" ::"r"(cluster_address(shared, rank)), "d"(value) : "memory");
#else
  if (rank == 0) *shared = value;
#endif
}
__device__ __forceinline__ void cluster_store(int* shared, int rank, int value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.relaxed.cluster.shared::cluster.s32 [%0], %1;\n" ::"r"(cluster_address(shared, rank)), "r"(value)
               : "memory");
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

// Its phases end when the bytes that were announced for them have come. Phase 0 comes first, then 1, and so on.
struct ArrivalBarrier {
  uint64_t state;
};

// By one thread, before the cluster's blocks meet for the first time.
__device__ __forceinline__ void init_arrival(ArrivalBarrier& barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\n" ::"r"(shared_address(&barrier))
      : "memory");
#endif
}

// By one thread, once for each phase.
__device__ __forceinline__ void expect_bytes(ArrivalBarrier& barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}\n" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Until the phase of that parity has ended. What came in it is then visible.
__device__ __forceinline__ void wait_arrival(ArrivalBarrier& barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting;\n}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
#endif
}

// 8 or 16 bytes to another block, counted at its barrier.
__device__ __forceinline__ void send(double* shared, ArrivalBarrier& barrier, int rank, double value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];\n" ::"r"(
                   cluster_address(shared, rank)),
               "d"(value), "r"(cluster_address(&barrier, rank))
               : "memory");
#else
  if (rank == 0) *shared = value;
#endif
}
__device__ __forceinline__ void send(double2* shared, ArrivalBarrier& barrier, int rank, double2 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f64 [%0], {%1, %2}, [%3];\n" ::"r"(
                   cluster_address(shared, rank)),
               "d"(value.x), "d"(value.y), "r"(cluster_address(&barrier, rank))
               : "memory");
#endif
}

}  // namespace farms_fast
