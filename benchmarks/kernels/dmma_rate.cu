// The rate of float64 products on the tensor cores out of registers alone, by the depth of an instruction:
// TFLOP/s over all multiprocessors. What kernels that load something as well are held against.
#include <cstdio>

#include "csrc/cuda/check.h"
#include "csrc/cuda/mma.cuh"

namespace farms_fast {
namespace {

constexpr int kWarps = 8;      // of a block
constexpr int kChains = 8;     // products under way in a warp, each behind the one before in its chain
constexpr int kRounds = 4096;  // products of a chain

__device__ __forceinline__ void mma_16x8x16(double (&d)[4], const double (&a)[8], const double (&b)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, {%12, "
      "%13, %14, %15}, {%0, %1, %2, %3};\n"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]), "d"(b[0]), "d"(b[1]),
        "d"(b[2]), "d"(b[3]));
#endif
}

struct Depth4 {
  static constexpr int depth = 4;
  static __device__ __forceinline__ void multiply(double (&d)[4], double a, double b) {
    const double left[2] = {a, a};
    mma_16x8x4(d, left, b);
  }
};
struct Depth8 {
  static constexpr int depth = 8;
  static __device__ __forceinline__ void multiply(double (&d)[4], double a, double b) {
    const double left[4] = {a, a, a, a}, right[2] = {b, b};
    mma_16x8x8(d, left, right);
  }
};
struct Depth16 {
  static constexpr int depth = 16;
  static __device__ __forceinline__ void multiply(double (&d)[4], double a, double b) {
    const double left[8] = {a, a, a, a, a, a, a, a}, right[4] = {b, b, b, b};
    mma_16x8x16(d, left, right);
  }
};

// out: a double for each thread, so that nothing is left out.
template <class Config>
__global__ void __launch_bounds__(32 * kWarps) multiply_kernel(double a, double b, double* out) {
  double d[kChains][4] = {};
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) Config::multiply(d[chain], a + chain, b);
  double sum = 0.0;
  for (const double (&of_chain)[4] : d)
    for (const double value : of_chain) sum += value;
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <class Config>
void measure(int processors) {
  const int blocks = 2 * processors;
  double* out = nullptr;
  cudaEvent_t start, end;
  FARMS_CUDA_CHECK(cudaMalloc(&out, sizeof(double) * blocks * 32 * kWarps));
  FARMS_CUDA_CHECK(cudaEventCreate(&start));
  FARMS_CUDA_CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int run = 0; run < 6; ++run) {
    FARMS_CUDA_CHECK(cudaEventRecord(start));
    multiply_kernel<Config><<<blocks, 32 * kWarps>>>(1.0 + run, 0.5, out);
    FARMS_LAUNCH_CHECK();
    FARMS_CUDA_CHECK(cudaEventRecord(end));
    FARMS_CUDA_CHECK(cudaEventSynchronize(end));
    float milliseconds = 0.0f;
    FARMS_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    if (run > 0 && milliseconds < best) best = milliseconds;
  }
  const double operations = 2.0 * 16 * 8 * Config::depth * kChains * kRounds * static_cast<double>(blocks * kWarps);
  std::printf("m16n8k%-2d %6.1f TFLOP/s\n", Config::depth, operations / best / 1e9);
  FARMS_CUDA_CHECK(cudaEventDestroy(start));
  FARMS_CUDA_CHECK(cudaEventDestroy(end));
  FARMS_CUDA_CHECK(cudaFree(out));
}

}  // namespace
}  // namespace farms_fast

int main() {
  int device = 0, processors = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  farms_fast::measure<farms_fast::Depth4>(processors);
  farms_fast::measure<farms_fast::Depth8>(processors);
  farms_fast::measure<farms_fast::Depth16>(processors);
}
