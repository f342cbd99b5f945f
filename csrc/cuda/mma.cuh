// Float64 matrix products of a warp, D (16 x 8) += A (16 x 4) * B (4 x 8), on the tensor cores where the architecture
// has them.
//
// Which lane holds which element (PTX ISA, "Matrix Fragments for mma.m16n8k4" with .f64, whose upper and lower half are
// each "Matrix Fragments for mma.m8n8k4 with .f64 floating point type"). Lane l has group g = l / 4 and t = l % 4:
//
//   A      column: 0    1    2    3      B  column:  0   1   2  ..  7      D    column: 0  1 | 2  3 | 4  5 | 6  7
//   row 0          l0   l1   l2   l3     row 0       l0  l4  l8 ..  l28    row 0        l0   | l1   | l2   | l3
//   row 1          l4   l5   l6   l7     row 1       l1  l5  l9 ..  l29    row 1        l4   | l5   | l6   | l7
//   ..                       a[0]        row 2       l2  l6  l10..  l30    ..                 d[0], d[1]
//   row 7          l28  l29  l30  l31    row 3       l3  l7  l11..  l31    row 7        l28  | l29  | l30  | l31
//   row 8          l0   l1   l2   l3                                       row 8        l0   | l1   | l2   | l3
//   ..                       a[1]                                          ..                 d[2], d[3]
//   row 15         l28  l29  l30  l31                                      row 15       l28  | l29  | l30  | l31
//
// that is A[g][t] = a[0], A[g + 8][t] = a[1], B[t][g] = b, D[g][2t + s] = d[s], D[g + 8][2t + s] = d[2 + s].
#pragma once

#include "csrc/cuda/warp.cuh"

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
  const int lane = threadIdx.x & 31, row = lane & ~3, column = (lane & 3) * 2;
  for (int k = 0; k < 4; ++k) {
    const double a0 = __shfl_sync(kAllLanes, a[0], row + k), a1 = __shfl_sync(kAllLanes, a[1], row + k);
    const double b0 = __shfl_sync(kAllLanes, b, column * 4 + k), b1 = __shfl_sync(kAllLanes, b, (column + 1) * 4 + k);
    d[0] += a0 * b0;
    d[1] += a0 * b1;
    d[2] += a1 * b0;
    d[3] += a1 * b1;
  }
#endif
}

// Twice as deep, D (16 x 8) += A (16 x 8) * B (8 x 8): a[0], a[1] and b[0] as above for the first four of the depth,
// a[2], a[3] and b[1] for the last four (PTX ISA, "Matrix Fragments for mma.m16n8k8" with .f64).
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
