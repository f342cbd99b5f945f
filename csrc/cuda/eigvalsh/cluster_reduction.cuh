// The reduction of a matrix to tridiagonal form in the registers of a cluster's blocks.
//
// A step, for every block: wait for the pieces of all blocks (one warp of each scheduler, at an arrival barrier of its
// own shared memory); make w and the next reflector; barrier of the block; pass over the registers; barrier of the
// block; send this block's pieces for the next step to all. Each block sends a step's pieces before it waits for those
// of the next step, and all blocks of a cluster run at the same time, so what a block waits for comes: it has been
// sent, or its sender is at work on it. Nobody is two steps ahead of another, since a step needs everybody's pieces of
// it; hence two sets of buffers and barriers, by the parity of the step.
#pragma once

#include "csrc/cuda/eigvalsh/cluster_exchange.cuh"
#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/eigvalsh/register_matrix.cuh"

namespace farms_fast {
namespace one_stage {

template <class Config>
struct ClusterReduction : RegisterMatrix<Config> {
  using Registers = RegisterMatrix<Config>;
  using Registers::all_rows;
  using Registers::column_group;
  using Registers::lane;
  using Registers::rank;
  using Registers::RegisterMatrix;
  using Registers::rows;
  using Registers::threads;
  using Registers::warp;
  static_assert((Config::column_groups & (Config::column_groups - 1)) == 0, "a power of two");
  // One warp of each scheduler makes the vectors of a step; more would wait for each other's shuffles.
  static constexpr int makers = 32 * (Config::warps < 4 ? Config::warps : 4);
  static constexpr int of_maker = (all_rows + makers - 1) / makers;  // elements of a vector

  // The block's rows go out by warps, in chunks of a warp's lanes: of those that share a chunk the first one sends its
  // inner products, the others its elements.
  static constexpr int chunks = (rows + 31) / 32;
  static constexpr int senders = Config::warps / chunks - 1;  // of a chunk's elements
  static_assert(senders > 0, "two warps for a chunk");

  // Inner products of the last reflector v, of p = A v and of the next pivot's column c, without the rows down to the
  // one below that pivot.
  enum Sum { kCC, kVV, kPP, kCV, kCP, kVP, kSums };

  // Of one block. Everything that the blocks send each other in a step; twice, since a fast block may be one ahead.
  struct ExchangedVectors {
    double2 pieces[2][all_rows];  // A u, and the next pivot's column before u and w have been taken out of it
    double sums[2][Config::cluster_blocks * chunks][8];
    double reflector[2][all_rows];  // u of this step and of the one before
    double w[all_rows];
    double product[Config::column_groups][rows];  // A u of this block's rows, by groups of columns
    double column[rows];
  };
  // What comes to each block for a step, its own pieces included: the barrier counts to it.
  static constexpr int bytes_of_step =
      sizeof(double2) * all_rows + sizeof(double) * Config::cluster_blocks * chunks * kSums;

  struct Arrivals {
    ArrivalBarrier barrier[2];
  };

  static __device__ __forceinline__ void expect(Arrivals& arrivals) {
    if (threadIdx.x == 0)
      for (ArrivalBarrier& barrier : arrivals.barrier) {
        init_arrival(barrier);
        expect_bytes(barrier, bytes_of_step);
      }
  }

  // As in the tile of one block, but every block makes w and the next reflector, all from the same pieces, which its
  // neighbours have sent it. `arrivals` expects the first two steps, and the cluster's blocks have met since.
  __device__ __forceinline__ void tridiagonal(int order, ExchangedVectors& shared, Arrivals& arrivals, double* diagonal,
                                              double* off_diagonal) {
    for (int i = threadIdx.x; i < all_rows; i += threads) shared.reflector[0][i] = 0.0;
    for (int at = threadIdx.x; at < Config::column_groups * rows; at += threads) shared.product[0][at] = 0.0;
    Registers::first_column(shared.column);
    __syncthreads();
    send_pieces(0, shared.reflector[0], shared, arrivals);

    double divisor = 0.0;  // of v
    for (int pivot = 0; pivot < order; ++pivot) {
      const double* v = shared.reflector[pivot & 1];
      double* u = shared.reflector[~pivot & 1];
      if (threadIdx.x < makers)
        divisor =
            make_vectors(pivot, order, divisor, shared, arrivals.barrier[pivot & 1], v, u, diagonal, off_diagonal);
      __syncthreads();
      if (pivot + 1 == order) return;
      Registers::pass(pivot + 1, v, shared.w, u, shared.column, shared.product[column_group()]);
      __syncthreads();
      send_pieces(pivot + 1, u, shared, arrivals);
    }
  }

 private:
  // What a step is made of, beside the vectors. w = tau p - half v.
  struct Reflection {
    double tau, half, v_pivot, w_pivot;
    double divisor, first, beta, diagonal;
  };

  // w of the last reflector v and the next reflector u, once the pieces have come. Returns u's divisor.
  static __device__ __forceinline__ double make_vectors(int pivot, int order, double divisor, ExchangedVectors& shared,
                                                        ArrivalBarrier& arrived, const double* v, double* u,
                                                        double* diagonal, double* off_diagonal) {
    const double tau = divisor > 0.0 ? fast_reciprocal(divisor) : 0.0;
    wait_arrival(arrived, pivot / 2 & 1);
    // For the step after the next one. Nobody sends for it before it has this block's pieces of the next.
    if (threadIdx.x == 0) expect_bytes(arrived, bytes_of_step);
    double sum[kSums];
    add_up(shared.sums[pivot & 1], sum);
    double2 pieces[of_maker];
    double own[of_maker];
#pragma unroll
    for (int e = 0; e < of_maker; ++e) {
      const int i = static_cast<int>(threadIdx.x) + makers * e;
      if (all_rows % makers != 0 && i >= all_rows) continue;
      pieces[e] = shared.pieces[pivot & 1][i];
      own[e] = v[i];
    }
    const Reflection next = reflect(pivot, order, tau, sum, shared.pieces[pivot & 1], v);
#pragma unroll
    for (int e = 0; e < of_maker; ++e) {
      const int i = static_cast<int>(threadIdx.x) + makers * e;
      if (all_rows % makers != 0 && i >= all_rows) continue;
      const double w = i < pivot ? 0.0 : fma(next.tau, pieces[e].x, -next.half * own[e]);
      const double x = fma(-w, next.v_pivot, fma(-own[e], next.w_pivot, pieces[e].y));
      shared.w[i] = w;
      u[i] = i <= pivot || next.divisor == 0.0 ? 0.0 : i == pivot + 1 ? next.first : x;
    }
    if (threadIdx.x == 0) {
      diagonal[pivot] = next.diagonal;
      off_diagonal[pivot] = next.beta;
    }
    return next.divisor;
  }

  // This block's rows of A u and of the next pivot's column, and their part of the inner products, to every block.
  __device__ __forceinline__ void send_pieces(int pivot, const double* u, ExchangedVectors& shared,
                                              Arrivals& arrivals) const {
    const int chunk = warp() % chunks, sender = warp() / chunks - 1, parity = pivot & 1;
    if (sender >= Config::cluster_blocks || sender >= senders) return;
    const int own = 32 * chunk + lane(), row = Registers::matrix_row(own);
    const bool valid = rows % 32 == 0 || own < rows;
    ArrivalBarrier& barrier = arrivals.barrier[parity];
    double p = 0.0, c = 0.0, v = 0.0;
    if (valid) {
      double parts[Config::column_groups];
#pragma unroll
      for (int group = 0; group < Config::column_groups; ++group) parts[group] = shared.product[group][own];
#pragma unroll
      for (int n = Config::column_groups / 2; n > 0; n /= 2)
#pragma unroll
        for (int group = 0; group < n; ++group) parts[group] += parts[group + n];
      p = parts[0];
      c = shared.column[own];
      v = u[row];
    }
    if (sender >= 0) {
#pragma unroll
      for (int to = sender; to < Config::cluster_blocks; to += senders)
        if (valid) send(&shared.pieces[parity][row], barrier, to, make_double2(p, c));
      return;
    }
    if (!valid || row <= pivot + 1) p = c = v = 0.0;
    double sum[8] = {};
    sum[kCC] = c * c;
    sum[kVV] = v * v;
    sum[kPP] = p * p;
    sum[kCV] = c * v;
    sum[kCP] = c * p;
    sum[kVP] = v * p;
    // Each exchange halves the sums that a lane goes on with.
#pragma unroll
    for (int offset = 16, n = 4; n > 0; offset /= 2, n /= 2) {
      const bool upper = lane() & offset;
#pragma unroll
      for (int s = 0; s < n; ++s) {
        const double kept = upper ? sum[s + n] : sum[s];
        sum[s] = kept + __shfl_xor_sync(kAllLanes, upper ? sum[s] : sum[s + n], offset);
      }
    }
    sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 2);
    sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 1);
    if (lane() % 4 == 0 && lane() / 4 < kSums)
#pragma unroll
      for (int to = 0; to < Config::cluster_blocks; ++to)
        send(&shared.sums[parity][rank * chunks + chunk][lane() / 4], barrier, to, sum[0]);
  }

  // The inner products from their parts. Every warp for itself, all with the same bits, here and below.
  static __device__ __forceinline__ void add_up(const double (&sets)[Config::cluster_blocks * chunks][8],
                                                double (&sum)[kSums]) {
    // Four lanes a sum, with every fourth of its parts each.
    constexpr int parts = (Config::cluster_blocks * chunks + 3) / 4;
    double part[parts];
#pragma unroll
    for (int i = 0; i < parts; ++i) {
      const int set = lane() / 8 + 4 * i;
      part[i] = lane() % 8 < kSums && set < Config::cluster_blocks * chunks ? sets[set][lane() % 8] : 0.0;
    }
#pragma unroll
    for (int n = parts; n > 1; n = (n + 1) / 2)
#pragma unroll
      for (int i = 0; i < n / 2; ++i) part[i] += part[i + (n + 1) / 2];
    part[0] += __shfl_xor_sync(kAllLanes, part[0], 8);
    part[0] += __shfl_xor_sync(kAllLanes, part[0], 16);
#pragma unroll
    for (int s = 0; s < kSums; ++s) sum[s] = __shfl_sync(kAllLanes, part[0], s);
  }

  // A reflection is 1 - tau u u^T; `tau` is v's, to within rounding.
  static __device__ __forceinline__ Reflection reflect(int pivot, int order, double tau, const double (&sum)[kSums],
                                                       const double2* pieces, const double* v) {
    const bool more = pivot + 1 < order;
    const int below = more ? pivot + 1 : pivot;
    const double v_pivot = v[pivot], v_below = more ? v[below] : 0.0;
    const double2 at_pivot = pieces[pivot], at_below = pieces[below];

    // 2 / v^T v with the v that came out, so that the reflection is orthogonal whatever the rounding of its norm was.
    const double vv = fma(v_pivot, v_pivot, fma(v_below, v_below, sum[kVV]));
    const double vp = fma(v_pivot, at_pivot.x, fma(v_below, at_below.x, sum[kVP]));
    Reflection r;
    const double less = fma(-0.5 * tau, vv, 1.0), half = 0.5 * tau * (tau * vp);  // tau^2 may overflow
    r.tau = fma(tau, less, tau);
    r.half = fma(2.0 * half, less, half);
    r.v_pivot = v_pivot;
    const double p_pivot = r.tau * at_pivot.x, p_below = r.tau * at_below.x;
    r.w_pivot = fma(-r.half, v_pivot, p_pivot);
    r.diagonal = fma(-2.0 * v_pivot, r.w_pivot, at_pivot.y);
    const double w_below = fma(-r.half, v_below, p_below);
    const double alpha = more ? fma(-w_below, v_pivot, fma(-v_below, r.w_pivot, at_below.y)) : 0.0;
    // The squares of x = c - a v - b p.
    const double a = fma(-2.0 * r.half, v_pivot, p_pivot), b = r.tau * v_pivot;
    const double of_p = b * fma(b, sum[kPP], -2.0 * sum[kCP]), vp_twice = 2.0 * b * sum[kVP];
    double squares = fma(a, fma(a, sum[kVV], vp_twice - 2.0 * sum[kCV]), sum[kCC] + of_p);
    const double terms = fma(a * a, sum[kVV], fma(b * b, sum[kPP], sum[kCC]));
    finish(r, alpha, squares);
    // Where the terms cancel, from the elements.
    if (!(squares > kCancelled * terms)) finish(r, alpha, squares_again(pivot, r, pieces, v));
    return r;
  }

  // The reflection of a column with `alpha` at its head and the sum of the other elements' squares.
  static __device__ __forceinline__ void finish(Reflection& r, double alpha, double squares) {
    // The largest element is near 1: a column of 1e-100 is zero, and its square would lose its digits.
    const bool any = squares > 1e-200;
    const double total = any ? fma(alpha, alpha, squares) : 1.0, norm = total * fast_rsqrt(total);
    const double beta = alpha > 0.0 ? -norm : norm;
    r.beta = any ? beta : alpha;
    r.first = any ? alpha - beta : 0.0;
    r.divisor = any ? norm * (norm + fabs(alpha)) : 0.0;
  }
  static constexpr double kCancelled = 0x1p-6;

  static __device__ __forceinline__ double squares_again(int pivot, const Reflection& r, const double2* pieces,
                                                         const double* v) {
    double squares = 0.0;
#pragma unroll 1
    for (int i = lane(); i < all_rows; i += 32) {
      const double w = fma(r.tau, pieces[i].x, -r.half * v[i]);
      const double x = fma(-w, r.v_pivot, fma(-v[i], r.w_pivot, pieces[i].y));
      if (i > pivot + 1) squares = fma(x, x, squares);
    }
    return warp_sum(squares);
  }
};

}  // namespace one_stage
}  // namespace farms_fast
