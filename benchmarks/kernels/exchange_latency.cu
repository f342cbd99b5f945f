// What a step of the reductions waits for, in cycles: chains of float64 arithmetic, of shuffles and of reads of shared
// memory, barriers of a block and of a cluster, and the exchange by st.async that the clusters use instead. Also, how
// many clusters of each size a device works on at a time.
#include <cstdio>

#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/cluster_exchange.cuh"
#include "csrc/cuda/eigvalsh/cluster_launch.h"
#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/hopper.h"
#include "csrc/cuda/warp.cuh"

namespace farms_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 512;  // of a chain
constexpr int kValues = 64;   // doubles that a block sends to each other one in an exchange

enum Measured { kFma, kRsqrt, kShuffle, kWarpSum, kShared, kRemote, kBlockBarrier, kClusterBarrier, kExchange, kCount };
const char* const kNames[] = {"multiply-add, float64", "fast_rsqrt",
                              "shuffle of a double",   "warp_sum",
                              "shared memory",         "shared memory of a neighbour",
                              "barrier of a block",    "barrier of a cluster",
                              "exchange by st.async"};

struct Shared {
  double values[2][hopper::kMaxClusterBlocks][kValues];
  ArrivalBarrier arrived[2];
  int next[32];  // a chain of indices
};

// Cycles of one round of step(round), by the block's first thread.
template <typename Step>
__device__ void measure(long long* cycles, const Step& step) {
  step(0);
  __syncthreads();
  const long long begin = clock64();
  for (int round = 0; round < kRounds; ++round) step(round);
  const long long end = clock64();
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = (end - begin) / kRounds;
  __syncthreads();
}

// grid: one cluster. cycles: (kCount,). sink: a double for each thread, so that nothing is left out. Every block takes
// part in every barrier and exchange, as many times as the others.
__global__ void __launch_bounds__(kThreads) latency_kernel(double a, double b, long long* cycles, double* sink) {
  extern __shared__ __align__(16) double shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int blocks = static_cast<int>(gridDim.x), rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
  constexpr int kBytes = kValues * static_cast<int>(sizeof(double));
  if (thread < 2) {
    init_arrival(shared.arrived[thread]);
    expect_bytes(shared.arrived[thread], blocks * kBytes);
  }
  if (thread < 32) shared.next[thread] = (thread + 1) % 32;
  cluster_sync();

  double x = a + thread;
  int at = thread % 32;
  measure(cycles + kFma, [&](int) { x = fma(x, b, a); });
  measure(cycles + kRsqrt, [&](int) { x = fast_rsqrt(x) + 1.0; });
  measure(cycles + kShuffle, [&](int) { x = __shfl_xor_sync(kAllLanes, x, 1); });
  measure(cycles + kWarpSum, [&](int) { x = warp_sum(x); });
  measure(cycles + kShared, [&](int) { at = *const_cast<volatile int*>(shared.next + at); });
#if __CUDA_ARCH__ >= 900
  at = static_cast<int>(cluster_address(shared.next + at, (rank + 1) % blocks));
  measure(cycles + kRemote, [&](int) {
    asm volatile("ld.shared::cluster.s32 %0, [%0];\n" : "+r"(at) : : "memory");
    at = static_cast<int>(cluster_address(shared.next + at % 32, (rank + 1) % blocks));
  });
#endif
  measure(cycles + kBlockBarrier, [&](int) { __syncthreads(); });
  measure(cycles + kClusterBarrier, [&](int) { cluster_sync(); });
  cluster_sync();
  // As in cluster_reduction.cuh: two barriers in turn, since a fast block may be one round ahead. It is never two: what
  // a block waits for in a round, its neighbours send after they have gone through the round before.
  int round = 0;
  measure(cycles + kExchange, [&](int) {
    const int parity = round & 1;
    if (thread < kValues)
      for (int to = 0; to < blocks; ++to)
        send(&shared.values[parity][rank][thread], shared.arrived[parity], to, x + thread);
    wait_arrival(shared.arrived[parity], round / 2 & 1);
    x += shared.values[parity][thread % blocks][thread % kValues];
    __syncthreads();
    if (thread == 0) expect_bytes(shared.arrived[parity], blocks * kBytes);
    ++round;
  });
  cluster_sync();
  sink[blockIdx.x * kThreads + thread] = x + at;
}

void measure_cluster(unsigned blocks) {
  const ClusterLaunch launch(latency_kernel, dim3(blocks), blocks, kThreads, sizeof(Shared), nullptr);
  long long* cycles = nullptr;
  double* sink = nullptr;
  FARMS_CUDA_CHECK(cudaMalloc(&cycles, sizeof(long long) * kCount));
  FARMS_CUDA_CHECK(cudaMemset(cycles, 0, sizeof(long long) * kCount));
  FARMS_CUDA_CHECK(cudaMalloc(&sink, sizeof(double) * kThreads * blocks));
  long long measured[kCount];
  for (int run = 0; run < 2; ++run) {
    FARMS_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, latency_kernel, 1.5, 0.5, cycles, sink));
    FARMS_CUDA_CHECK(cudaMemcpy(measured, cycles, sizeof(measured), cudaMemcpyDeviceToHost));
  }
  std::printf("clusters of %u, cycles\n", blocks);
  for (int i = blocks == 2 ? 0 : kRemote; i < kCount; ++i) std::printf("  %-30s %6lld\n", kNames[i], measured[i]);

  // As large as the solver's blocks, one to a multiprocessor.
  const ClusterLaunch large(latency_kernel, dim3(blocks), blocks, kThreads, hopper::kBlockSharedBytes, nullptr);
  int clusters = 0;
  FARMS_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, latency_kernel, &large.config));
  std::printf("  %-30s %6d\n", "clusters at a time", clusters);
  FARMS_CUDA_CHECK(cudaFree(cycles));
  FARMS_CUDA_CHECK(cudaFree(sink));
}

}  // namespace
}  // namespace farms_fast

int main() {
  for (const unsigned blocks : {2u, 4u, 8u}) farms_fast::measure_cluster(blocks);
}
