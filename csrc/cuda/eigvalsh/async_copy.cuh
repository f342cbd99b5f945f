// Copies from global to shared memory that run beside the arithmetic. Architectures without them get plain copies.
#pragma once

#include <cuda_pipeline_primitives.h>
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
// Not by __pipeline_memcpy_async(): with a size that is not a constant it compiles to more instructions in
// band_product.cu.
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

__device__ __forceinline__ void copy_commit() { __pipeline_commit(); }

// Until at most `Pending` of this thread's groups are still under way.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
  __pipeline_wait_prior(Pending);
}

}  // namespace farms_fast
