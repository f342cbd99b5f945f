// Four Householder reflectors as one block reflector, I - V T V^T, on 32 x 32 blocks that a warp keeps in registers as
// the accumulators of products on the tensor cores in float64.
#pragma once

#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"
#include "csrc/cuda/mma.cuh"

namespace farms_fast {

// Doubles of a reflector in shared memory: reads of all four touch a bank once.
constexpr int kReflectorPitch = kWideBand + 4;

// A lane of a fragment, see mma.cuh, and what it holds:
//
//   32 x 32, a block of the matrix, as accumulators: row 16 i + 8 h + g, column 8 j + 2 t + s at [i][j][2 h + s]
//   32 x 4, a left or a right operand: row 8 m + g, column t at [m]
//   4 x 4: row t, column g / 2 at even g, and zero at odd g. What it is multiplied into then comes out as accumulators
//   whose even elements are a 32 x 4 operand again:
//
//     columns of B:        0  1  2  3  4  5  6  7      column 2 t of D is column t of the product,
//     columns of 4 x 4:    0  -  1  -  2  -  3  -      its odd columns are zero
struct FragmentLane {
  int lane, g, t;
};

struct Reflectors {
  double row[4];   // V, 32 x 4
  double deep[4];  // V's rows 8 j + 2 t + g % 2, column g / 2: what the blocks are multiplied by
  double minus_t;  // -T, 4 x 4
};

// In shared memory, of one warp alone: its reflectors on their way from one form to the other.
struct ReflectorExchange {
  double v[kNarrowBand][kReflectorPitch];
};

__device__ __forceinline__ double from_lane(double value, int lane) { return __shfl_sync(kAllLanes, value, lane); }

// Out of a product of the accumulators' kind: the form of 32 x 4 matrices.
__device__ __forceinline__ double row_of(const double (&sum)[2][4], int m) { return sum[m / 2][m % 2 * 2]; }

// block * V. The two elements that a lane has of a row, as they lie in its registers, are left operands of one product:
// the upper half of it takes the even columns of the block, the lower half the odd ones, and V has its even rows in the
// even columns. Half of what comes out is of use.
__device__ __forceinline__ void multiply(const double (&block)[2][4][4], const double (&deep)[4],
                                         double (&product)[4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    double sum[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const double left[2] = {block[m / 2][j][m % 2 * 2], block[m / 2][j][m % 2 * 2 + 1]};
      mma_16x8x4(sum, left, deep[j]);
    }
    product[m] = sum[0] + sum[3];
  }
}

// matrix (32 x 4) * square (4 x 4), added to sum.
__device__ __forceinline__ void multiply_square(const double (&matrix)[4], double square, double (&sum)[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const double left[2] = {matrix[2 * i], matrix[2 * i + 1]};
    mma_16x8x4(sum[i], left, square);
  }
}

// block += left * right^T in the rows of i.
__device__ __forceinline__ void add_outer(double (&block)[4][4], const double (&left)[4], const double (&right)[4],
                                          int i, int from_j) {
  const double pair[2] = {left[2 * i], left[2 * i + 1]};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j >= from_j) mma_16x8x4(block[j], pair, right[j]);
}

// left^T * right of two 32 x 4 matrices: row t and column g / 2, at odd g too.
__device__ __forceinline__ double multiply_transposed(const double (&left)[4], const double (&right)[4],
                                                      const FragmentLane& at) {
  double sum[4];  // with right's column t ^ offset
#pragma unroll
  for (int offset = 0; offset < 4; ++offset) {
    double term[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) term[m] = offset == 0 ? right[m] : __shfl_xor_sync(kAllLanes, right[m], offset);
    sum[offset] = (left[0] * term[0] + left[1] * term[1]) + (left[2] * term[2] + left[3] * term[3]);
  }
  // Sums over the rows; each exchange also halves the offsets, so that one column stays.
  const bool upper = ((at.g >> 2) ^ (at.t >> 1)) != 0, odd = ((at.g >> 1 & 1) ^ (at.t & 1)) != 0;
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const double keep = upper ? sum[q + 2] : sum[q], give = upper ? sum[q] : sum[q + 2];
    sum[q] = keep + __shfl_xor_sync(kAllLanes, give, 16);
  }
  const double keep = odd ? sum[1] : sum[0], give = odd ? sum[0] : sum[1];
  const double both = keep + __shfl_xor_sync(kAllLanes, give, 8);
  return both + __shfl_xor_sync(kAllLanes, both, 4);
}

// Householder QR of four columns of 32 rows, a 32 x 4 matrix. On return its triangle in the first four rows, at corner
// of the lanes with g < 4, and its reflectors.
__device__ __forceinline__ void factor(double (&x)[4], const FragmentLane& at, ReflectorExchange& exchange,
                                       Reflectors& reflectors, double& corner) {
  // Below its diagonal element a column that is done stays as it was, v but for its scale.
  double tau[kNarrowBand], scale[kNarrowBand], products[kNarrowBand][kNarrowBand], own_scale = 0, own_beta = 0;
#pragma unroll
  for (int q = 0; q < kNarrowBand; ++q) {
    const int in_column = (at.lane & ~3) | q;
    double column[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) column[m] = from_lane(x[m], in_column);
    if (at.g < q) column[0] = 0;
    const double pivot = from_lane(x[0], 4 * q + at.t), alpha = from_lane(pivot, q);
    double total = (column[0] * x[0] + column[1] * x[1]) + (column[2] * x[2] + column[3] * x[3]);
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    const Reflector h = make_reflector(alpha, from_lane(total, q));
    const double product = h.scale * (total - h.beta * pivot);
    const double coefficient = at.t > q ? h.tau * product : 0.0, scaled = h.scale * coefficient;
    tau[q] = h.tau;
    scale[q] = h.scale;
    if (at.t == q) {
      own_scale = h.scale;
      own_beta = h.beta;
    }
#pragma unroll
    for (int l = 0; l < q; ++l) products[l][q] = scale[l] * from_lane(product, l);
    x[0] -= at.g == q ? coefficient : column[0] * scaled;
#pragma unroll
    for (int m = 1; m < 4; ++m) x[m] -= column[m] * scaled;
  }

  corner = at.g < at.t ? x[0] : (at.g == at.t ? own_beta : 0.0);
  reflectors.row[0] = at.g > at.t ? x[0] * own_scale : (at.g == at.t ? 1.0 : 0.0);
#pragma unroll
  for (int m = 1; m < 4; ++m) reflectors.row[m] = x[m] * own_scale;
  __syncwarp();  // what the last ones left has been read
#pragma unroll
  for (int m = 0; m < 4; ++m) exchange.v[at.t][8 * m + at.g] = reflectors.row[m];
  __syncwarp();
#pragma unroll
  for (int m = 0; m < 4; ++m) reflectors.deep[m] = exchange.v[at.g / 2][8 * m + 2 * at.t + at.g % 2];
  // t_j = -tau_j (t . (V^T v_j)) above the diagonal.
  double t[kNarrowBand][kNarrowBand];
  reflectors.minus_t = 0;
#pragma unroll
  for (int j = 0; j < kNarrowBand; ++j)
#pragma unroll
    for (int l = 0; l <= j; ++l) {
      t[l][j] = tau[j];
      if (l < j) {
        double sum = 0;
#pragma unroll
        for (int i = l; i < j; ++i) sum += t[l][i] * products[i][j];
        t[l][j] = -tau[j] * sum;
      }
      if (at.t == l && at.g == 2 * j) reflectors.minus_t = -t[l][j];
    }
}

}  // namespace farms_fast
