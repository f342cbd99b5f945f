// Float64 matrix products of a warp, D (16 x 8) += A (16 x 4) * B (4 x 8), on the tensor cores where the architecture
// has them. Lane l holds, with g = l / 4 and t = l % 4: A[g][t] and A[g + 8][t], B[t][g], and of D the elements
// [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1].
#pragma once

namespace farms_fast {

__device__ __forceinline__ void mma_16x8x4(double (&d)[4], const double (&a)[2], double b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
               : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
               : "d"(a[0]), "d"(a[1]), "d"(b));
#elif __CUDA_ARCH__ >= 800
  // Two 8 x 8 x 4 products: the halves of A share B.
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a[0]), "d"(b));
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
               : "+d"(d[2]), "+d"(d[3])
               : "d"(a[1]), "d"(b));
#else
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x & 31, row = lane & ~3, column = (lane & 3) * 2;
  for (int k = 0; k < 4; ++k) {
    const double a0 = __shfl_sync(all, a[0], row + k), a1 = __shfl_sync(all, a[1], row + k);
    const double b0 = __shfl_sync(all, b, column * 4 + k), b1 = __shfl_sync(all, b, (column + 1) * 4 + k);
    d[0] += a0 * b0;
    d[1] += a0 * b1;
    d[2] += a1 * b0;
    d[3] += a1 * b1;
  }
#endif
}

// Twice as deep: a and b of the first four, then of the last four.
__device__ __forceinline__ void mma_16x8x8(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
  const double first[2] = {a[0], a[1]}, last[2] = {a[2], a[3]};
  mma_16x8x4(d, first, b[0]);
  mma_16x8x4(d, last, b[1]);
#endif
}

}  // namespace farms_fast
