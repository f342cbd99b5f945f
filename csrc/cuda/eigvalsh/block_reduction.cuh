// The reduction of a matrix to tridiagonal form in the registers of one block.
//
// A step has two barriers of the block: the first warp makes w and the next reflector between the one that ends a pass
// and the one that begins the next. The last step leaves after the first of them, in all threads alike.
#pragma once

#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/eigvalsh/register_matrix.cuh"

namespace farms_fast {
namespace one_stage {

template <class Config>
struct BlockReduction : RegisterMatrix<Config> {
  using Registers = RegisterMatrix<Config>;
  using Registers::column_group;
  using Registers::lane;
  using Registers::RegisterMatrix;
  using Registers::rows;
  using Registers::threads;
  using Registers::warp;
  static constexpr int per_lane = (rows + 31) / 32;  // of a vector that one warp holds

  // What the warps exchange in the reduction. One vector has an element for each row; those past `rows` stay 0.
  struct StepVectors {
    double product[Config::column_groups][32 * per_lane];  // A u, by groups of columns
    double column[32 * per_lane];        // the next pivot's column, before u and w have been taken out of it
    double reflector[2][32 * per_lane];  // u of this step and of the one before
    double w[32 * per_lane];
  };

  // Householder reduction to tridiagonal form. One pass over the registers a step: the step takes the last reflection's
  // v w^T + w v^T out of the matrix, multiplies it by the new u, and hands on the next pivot's column; the first warp
  // makes the next reflector from these.
  __device__ __forceinline__ void tridiagonal(int order, StepVectors& shared, double* diagonal, double* off_diagonal) {
    for (int i = threadIdx.x; i < 32 * per_lane; i += threads) {
      for (double (&part)[32 * per_lane] : shared.product) part[i] = 0.0;
      shared.reflector[0][i] = 0.0;
      shared.reflector[1][i] = 0.0;
      shared.w[i] = 0.0;
      if (i >= rows) shared.column[i] = 0.0;
    }
    Registers::first_column(shared.column);
    __syncthreads();

    double divisor = 0.0;  // of the first warp only
    for (int pivot = 0; pivot < order; ++pivot) {
      const double* v = shared.reflector[pivot & 1];
      double* u = shared.reflector[~pivot & 1];
      if (warp() == 0) divisor = reflect(pivot, order, divisor, shared, v, u, diagonal, off_diagonal);
      __syncthreads();
      if (pivot + 1 == order) return;
      Registers::pass(pivot + 1, v, shared.w, u, shared.column, shared.product[column_group()]);
      __syncthreads();
    }
  }

 private:
  static __device__ __forceinline__ double product_of(const StepVectors& shared, int i) {
    double sum = shared.product[0][i];
#pragma unroll
    for (int group = 1; group < Config::column_groups; ++group) sum += shared.product[group][i];
    return sum;
  }

  // The first warp: w of the last reflector v from A v, then the pivot's column with both taken out, its diagonal
  // element, and the reflector u that clears it below. A reflection is 1 - u u^T / divisor, or 1 where the divisor is
  // 0; `divisor` is v's, u's is returned.
  static __device__ __forceinline__ double reflect(int pivot, int order, double divisor, StepVectors& shared,
                                                   const double* v, double* u, double* diagonal, double* off_diagonal) {
    const double tau = divisor > 0.0 ? fast_reciprocal(divisor) : 0.0;
    double x[per_lane], own[per_lane], w[per_lane], dot = 0.0;
#pragma unroll
    for (int e = 0; e < per_lane; ++e) {
      const int i = lane() + 32 * e;
      own[e] = v[i];
      w[e] = product_of(shared, i);
      x[e] = shared.column[i];
      dot = fma(own[e], w[e], dot);
    }
    const double v_pivot = v[pivot], p_pivot = product_of(shared, pivot), c_pivot = shared.column[pivot];
    const bool more = pivot + 1 < order;
    const int below = more ? pivot + 1 : pivot;
    const double v_below = v[below], p_below = product_of(shared, below), c_below = shared.column[below];
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
      const double total = fma(alpha, alpha, squares), norm = total * fast_rsqrt(total);
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
