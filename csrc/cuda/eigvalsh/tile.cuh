// A symmetric matrix in the registers of a block, in the layout in which the tensor cores leave a product, and what is
// done to it there. Warp w holds rows 16 w .. 16 w + 15. Lane l, with g = l / 4 and t = l % 4, holds of the c-th eight
// columns the elements [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1]. The first columns may live in shared memory
// instead, where registers are short: the reduction is done with them first.
#pragma once

#include "../../gram.h"
#include "../mma.cuh"
#include "load.cuh"

namespace farms_fast {
namespace one_stage {

constexpr int kDepth = 16;          // elements of the vectors per slab
constexpr int kPitch = kDepth + 4;  // doubles per vector in shared memory: a warp's fragment loads then touch 32 banks

// Products to unroll. Without tensor cores one is many instructions, and unrolling them takes minutes to compile.
#if __CUDA_ARCH__ >= 800
constexpr int kUnroll = kDepth / 4;
#else
constexpr int kUnroll = 1;
#endif

// Tiles: eights of columns, of which the first Spilled are in shared memory.
template <int Warps, int Tiles, int Spilled>
struct Tile {
  static constexpr int threads = 32 * Warps;
  static constexpr int rows = 16 * Warps;
  static constexpr int per_lane = (rows + 31) / 32;  // of a vector that one warp holds

  // In shared memory each lane has its elements side by side, no two lanes in one bank.
  struct Spill {
    double2 a[Spilled > 0 ? Spilled : 1][2][threads];
  };

  double a[Tiles - Spilled][4];
  Spill& spill;

  __device__ __forceinline__ explicit Tile(Spill& memory) : spill(memory) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int row() { return 16 * warp() + lane() / 4; }  // and the one eight below it

  // The Gram matrix of a window of `order` real vectors. slab: [rows][kPitch].
  __device__ __forceinline__ void gram(const WindowView& window, DType type, int order, double* slab) {
    each_tile([](double (&d)[4], int) { d[0] = d[1] = d[2] = d[3] = 0.0; });
    Slabs<rows, kDepth, kPitch, threads> slabs(window, type, order);
    const double* left = slab + row() * kPitch + lane() % 4;
    const double* right = slab + lane() / 4 * kPitch + lane() % 4;
    while (slabs.any()) {
      slabs.copy(slab);
      __syncthreads();
#pragma unroll
      for (int c = 0; c < Spilled; ++c) {
        double d[4];
        unspill(c, d);
#pragma unroll kUnroll
        for (int k = 0; k < kDepth; k += 4) {
          const double rows_of_a[2] = {left[k], left[8 * kPitch + k]};
          mma_16x8x4(d, rows_of_a, right[8 * c * kPitch + k]);
        }
        spill_back(c, d);
      }
#pragma unroll kUnroll
      for (int k = 0; k < kDepth; k += 4) {
        const double rows_of_a[2] = {left[k], left[8 * kPitch + k]};
#pragma unroll
        for (int c = Spilled; c < Tiles; ++c) mma_16x8x4(a[c - Spilled], rows_of_a, right[8 * c * kPitch + k]);
      }
      __syncthreads();
    }
  }

  // A ready matrix; both triangles from the lower one.
  __device__ __forceinline__ void read(const RealMatrix& source) {
    each_tile([&](double (&d)[4], int c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[e] = source(row() + e / 2 * 8, 8 * c + lane() % 4 * 2 + e % 2);
    });
  }

  // Scales the largest magnitude into [1, 2) and returns log2 of what was taken out; kNotFinite where a value is not
  // finite. shared: a double for each warp.
  static constexpr int kNotFinite = 1 << 20;
  __device__ __forceinline__ int scale(double* shared) {
    double largest = 0.0;
    bool finite = true;
    each_tile([&](double (&d)[4], int) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        finite = finite && isfinite(d[e]);
        largest = fmax(largest, fabs(d[e]));
      }
    });
    for (int offset = 16; offset > 0; offset /= 2) largest = fmax(largest, __shfl_xor_sync(~0u, largest, offset));
    if (lane() == 0) shared[warp()] = largest;
    if (!__syncthreads_and(finite)) return kNotFinite;
    for (int w = 0; w < Warps; ++w) largest = fmax(largest, shared[w]);
    const int exponent = largest > 0.0 ? ilogb(largest) : 0;
    // In two steps: 2^-exponent itself may be out of range.
    const double half = scalbn(1.0, -exponent / 2), rest = scalbn(1.0, -exponent + exponent / 2);
    each_tile([&](double (&d)[4], int) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[e] = d[e] * half * rest;
    });
    return exponent;
  }

  // What the warps exchange in the reduction. One vector has an element for each row; those past `rows` stay 0.
  struct Vectors {
    double product[32 * per_lane];       // A u
    double column[32 * per_lane];        // the next pivot's column, before u and w have been taken out of it
    double reflector[2][32 * per_lane];  // u of this step and of the one before
    double w[32 * per_lane];
  };

  // Householder reduction to tridiagonal form. One pass over the registers a step: the step takes the last reflection's
  // v w^T + w v^T out of the matrix, multiplies it by the new u, and hands on the next pivot's column; the first warp
  // makes the next reflector from these.
  __device__ __forceinline__ void tridiagonal(int order, Vectors& shared, double* diagonal, double* off_diagonal) {
    for (int i = threadIdx.x; i < 32 * per_lane; i += threads) {
      shared.product[i] = 0.0;
      shared.reflector[0][i] = 0.0;
      shared.reflector[1][i] = 0.0;
      shared.w[i] = 0.0;
      if (i >= rows) shared.column[i] = 0.0;
    }
    if (lane() % 4 == 0) {
      double first[4];
      tile(0, first);
      shared.column[row()] = first[0];
      shared.column[row() + 8] = first[2];
    }
    __syncthreads();

    double divisor = 0.0;  // of the first warp only
    for (int pivot = 0; pivot < order; ++pivot) {
      const double* v = shared.reflector[pivot & 1];
      double* u = shared.reflector[~pivot & 1];
      if (warp() == 0) divisor = reflect(pivot, order, divisor, shared, v, u, diagonal, off_diagonal);
      __syncthreads();
      if (pivot + 1 == order) return;
      if (16 * warp() + 15 > pivot) pass(pivot, shared, v, u);
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void unspill(int c, double (&d)[4]) const {
    const double2 upper = spill.a[c][0][threadIdx.x], lower = spill.a[c][1][threadIdx.x];
    d[0] = upper.x, d[1] = upper.y, d[2] = lower.x, d[3] = lower.y;
  }

  __device__ __forceinline__ void spill_back(int c, const double (&d)[4]) {
    spill.a[c][0][threadIdx.x] = make_double2(d[0], d[1]);
    spill.a[c][1][threadIdx.x] = make_double2(d[2], d[3]);
  }

  // c is a constant once the loop around it is unrolled, here and below.
  __device__ __forceinline__ void tile(int c, double (&d)[4]) const {
    if (c < Spilled) {
      unspill(c, d);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[e] = a[c - Spilled][e];
    }
  }

  template <typename Change>
  __device__ __forceinline__ void change_tile(int c, const Change& change) {
    if (c < Spilled) {
      double d[4];
      unspill(c, d);
      change(d, c);
      spill_back(c, d);
    } else {
      change(a[c - Spilled], c);
    }
  }

  template <typename Change>
  __device__ __forceinline__ void each_tile(const Change& change) {
#pragma unroll
    for (int c = 0; c < Tiles; ++c) change_tile(c, change);
  }

  // Two columns' elements of the vectors.
  struct Columns {
    double2 v, w, u;
  };

  static __device__ __forceinline__ Columns columns(int c, const double* v, const double* w, const double* u) {
    const int at = 4 * c + lane() % 4;
    return {reinterpret_cast<const double2*>(v)[at], reinterpret_cast<const double2*>(w)[at],
            reinterpret_cast<const double2*>(u)[at]};
  }

  // The next pivot's column, out of the tile that holds it.
  static __device__ __forceinline__ void hand_on(const double (&d)[4], int next, double* column) {
    if (lane() % 4 == next % 8 / 2) {
      column[row()] = next & 1 ? d[1] : d[0];
      column[row() + 8] = next & 1 ? d[3] : d[2];
    }
  }

  __device__ __forceinline__ void pass(int pivot, Vectors& shared, const double* v, const double* u) {
    const int g = row(), t = lane() % 4, next = pivot + 1;
    const double v0 = v[g], v1 = v[g + 8], w0 = shared.w[g], w1 = shared.w[g + 8];
    double sum[4] = {};
    const auto work = [&](double (&d)[4], const Columns& at) {
      d[0] = fma(-w0, at.v.x, fma(-v0, at.w.x, d[0]));
      d[1] = fma(-w0, at.v.y, fma(-v0, at.w.y, d[1]));
      d[2] = fma(-w1, at.v.x, fma(-v1, at.w.x, d[2]));
      d[3] = fma(-w1, at.v.y, fma(-v1, at.w.y, d[3]));
      sum[0] = fma(d[0], at.u.x, sum[0]);
      sum[1] = fma(d[1], at.u.y, sum[1]);
      sum[2] = fma(d[2], at.u.x, sum[2]);
      sum[3] = fma(d[3], at.u.y, sum[3]);
    };
    // The tiles before the next pivot's are done. Those in registers go by twos, so that more loads are under way.
    const int first = next / 8;
#pragma unroll
    for (int c = 0; c < Spilled; ++c)
      if (c >= first) {
        const Columns at = columns(c, v, shared.w, u);
        double d[4];
        unspill(c, d);
        work(d, at);
        spill_back(c, d);
        if (c == first) hand_on(d, next, shared.column);
      }
#pragma unroll
    for (int c = Spilled; c < Tiles; c += 2)
      if (c + 1 >= first) {
        const Columns left = columns(c, v, shared.w, u), right = columns(c + 1 < Tiles ? c + 1 : c, v, shared.w, u);
        work(a[c - Spilled], left);
        if (c + 1 < Tiles) work(a[c + 1 - Spilled], right);
      }
#pragma unroll
    for (int c = Spilled; c < Tiles; ++c)
      if (c == first) hand_on(a[c - Spilled], next, shared.column);
    // Four lanes share a row: the upper two of them end up with the lower row's sum.
    const double upper = sum[0] + sum[1], lower = sum[2] + sum[3];
    double total = t & 2 ? lower : upper;
    total += __shfl_xor_sync(~0u, t & 2 ? upper : lower, 2);
    total += __shfl_xor_sync(~0u, total, 1);
    if ((t & 1) == 0) shared.product[g + 4 * t] = total;
  }

  static __device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
  }

  // The first warp: w of the last reflector v from A v, then the pivot's column with both taken out, its diagonal
  // element, and the reflector u that clears it below. A reflection is 1 - u u^T / divisor, or 1 where the divisor is
  // 0; `divisor` is v's, u's is returned.
  static __device__ __forceinline__ double reflect(int pivot, int order, double divisor, Vectors& shared,
                                                   const double* v, double* u, double* diagonal, double* off_diagonal) {
    const double tau = divisor > 0.0 ? 1.0 / divisor : 0.0;
    double x[per_lane], own[per_lane], w[per_lane], dot = 0.0;
#pragma unroll
    for (int e = 0; e < per_lane; ++e) {
      const int i = lane() + 32 * e;
      own[e] = v[i];
      w[e] = shared.product[i];
      x[e] = shared.column[i];
      dot = fma(own[e], w[e], dot);
    }
    const double v_pivot = v[pivot], p_pivot = shared.product[pivot], c_pivot = shared.column[pivot];
    const bool more = pivot + 1 < order;
    const int below = more ? pivot + 1 : pivot;
    const double v_below = v[below], p_below = shared.product[below], c_below = shared.column[below];
    const double half = 0.5 * tau * (tau * warp_sum(dot));
    const double w_pivot = fma(tau, p_pivot, -half * v_pivot), w_below = fma(tau, p_below, -half * v_below);
    const double alpha = more ? fma(-w_below, v_pivot, fma(-v_below, w_pivot, c_below)) : 0.0;
    double squares = 0.0;
#pragma unroll
    for (int e = 0; e < per_lane; ++e) {
      const int i = lane() + 32 * e;
      w[e] = i < pivot ? 0.0 : fma(tau, w[e], -half * own[e]);
      x[e] = i > pivot + 1 ? fma(-w[e], v_pivot, fma(-own[e], w_pivot, x[e])) : 0.0;
      squares = fma(x[e], x[e], squares);
      shared.w[i] = w[e];
    }
    squares = warp_sum(squares);
    double beta = alpha, first = 0.0;
    divisor = 0.0;
    // The largest element is near 1: a column of 1e-100 is zero, and its square would lose its digits.
    const bool any = squares > 1e-200;
    if (any) {
      const double total = fma(alpha, alpha, squares), norm = total * rsqrt(total);
      beta = alpha > 0.0 ? -norm : norm;
      first = alpha - beta;
      divisor = norm * (norm + fabs(alpha));
    }
#pragma unroll
    for (int e = 0; e < per_lane; ++e) {
      const int i = lane() + 32 * e;
      u[i] = !any ? 0.0 : i == pivot + 1 ? first : x[e];
    }
    if (lane() == 0) {
      diagonal[pivot] = fma(-2.0 * v_pivot, w_pivot, c_pivot);
      off_diagonal[pivot] = beta;
    }
    return divisor;
  }
};

}  // namespace one_stage
}  // namespace farms_fast
