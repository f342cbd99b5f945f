// A symmetric matrix in the registers of a block, or of the blocks of a cluster, in the layout in which the tensor
// cores leave a product, and what is done to it there.
//
// Rows: eights of them go to the blocks of a cluster in turn. A block's go to its groups of warps, sixteen at a time (a
// strip) and `strips` times; the `column_groups` warps of a group have the same rows. Columns: eights of them (tiles)
// go to the warps of a group in turn. For two blocks and four warps, groups of two, one strip and two tiles:
//
//   column:      0..7    8..15   16..23  24..31
//   rows  0..7   warp 0  warp 1  warp 0  warp 1   block 0   upper half of strip 0
//   rows  8..15  warp 0  warp 1  warp 0  warp 1   block 1   upper half of strip 0
//   rows 16..23  warp 0  warp 1  warp 0  warp 1   block 0   lower half of strip 0
//   rows 24..31  warp 0  warp 1  warp 0  warp 1   block 1   lower half of strip 0
//   rows 32..39  warp 2  warp 3  warp 2  warp 3   block 0   upper half of strip 0
//
// In the 16 x 8 elements of a strip and a tile a lane holds those of D in mma.cuh, the lower half being 8 * blocks rows
// below the upper one. The first `spilled_tiles` of a warp's tiles live in shared memory, where registers are short:
// the reduction is done with them first.
#pragma once

#include "csrc/cuda/eigvalsh/load.cuh"
#include "csrc/cuda/eigvalsh/matrix_config.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/gram.h"

namespace farms_fast {
namespace one_stage {

// Products to unroll. Without tensor cores one is many instructions, and unrolling them takes minutes to compile.
#if __CUDA_ARCH__ >= 800
constexpr int kGramUnroll = kSlabDepth / 4;
#else
constexpr int kGramUnroll = 1;
#endif

template <class Config>
struct RegisterMatrix : MatrixShape<Config> {
  using MatrixShape<Config>::threads;
  using MatrixShape<Config>::rows;
  using MatrixShape<Config>::all_rows;
  static constexpr int lower = 8 * Config::cluster_blocks;  // from a lane's upper row to its lower one
  // From a warp's strip to its next one, and from a group of warps to the next, in strips. In a cluster all groups then
  // have the same work to the end; several blocks on a multiprocessor make up for each other.
  static constexpr int kStripStep = Config::cluster_blocks > 1 ? Config::warps / Config::column_groups : 1,
                       kGroupStep = Config::cluster_blocks > 1 ? 1 : Config::strips;
  // Config::tiles that a warp works on at a time. A block that shares its multiprocessor has no registers for more.
  static constexpr int kTogether = Config::cluster_blocks > 1 ? 4 : 2;
  static constexpr int kSpillsTogether = Config::cluster_blocks > 2 ? 2 : 1;

  // In shared memory each lane has its elements side by side, no two lanes in one bank.
  struct Spill {
    double2 a[Config::spilled_tiles > 0 ? Config::spilled_tiles : 1][Config::strips][2][threads];
  };

  double a[Config::tiles - Config::spilled_tiles][Config::strips][4];
  Spill& spill;
  const int rank;  // of this block in its cluster

  __device__ __forceinline__ explicit RegisterMatrix(Spill& memory, int block = 0) : spill(memory), rank(block) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int column_group() { return warp() % Config::column_groups; }
  static __device__ __forceinline__ int tile_of(int c) { return Config::column_groups * c + column_group(); }

  // Of the block's rows, the lane's upper one of a strip; the other one is the eighth from there.
  static __device__ __forceinline__ int own_row(int strip) {
    return 16 * (kStripStep * strip + kGroupStep * (warp() / Config::column_groups)) + lane() / 4;
  }
  // A row of the block as a row of the matrix.
  __device__ __forceinline__ int matrix_row(int own) const {
    return 8 * (Config::cluster_blocks * (own / 8) + rank) + own % 8;
  }
  __device__ __forceinline__ int row(int strip) const { return matrix_row(own_row(strip)); }
  // Whether any row of the warp's strip comes after `pivot`.
  __device__ __forceinline__ bool rows_after(int pivot, int strip) const {
    return matrix_row(16 * (kStripStep * strip + kGroupStep * (warp() / Config::column_groups) + 1) - 1) > pivot;
  }

  // The Gram matrix of a window of `order` real vectors. slab: [all_rows][kSlabPitch].
  __device__ __forceinline__ void gram(const WindowView& window, DType type, int order, double* slab) {
    each_tile([](double (&d)[4], int, int) { d[0] = d[1] = d[2] = d[3] = 0.0; });
    Slabs<Config> slabs(window, type, order);
    const double* left = slab + row(0) * kSlabPitch + lane() % 4;
    const double* right = slab + (8 * column_group() + lane() / 4) * kSlabPitch + lane() % 4;
    constexpr int strip_step = 2 * lower * kStripStep * kSlabPitch, tile_step = 8 * Config::column_groups * kSlabPitch;
    while (slabs.any()) {
      slabs.copy(slab);
      __syncthreads();
#pragma unroll
      for (int c = 0; c < Config::spilled_tiles; ++c)
#pragma unroll
        for (int s = 0; s < Config::strips; ++s) {
          double d[4];
          unspill(c, s, d);
#pragma unroll kGramUnroll
          for (int k = 0; k < kSlabDepth; k += 4) {
            const double rows_of_a[2] = {left[strip_step * s + k], left[strip_step * s + lower * kSlabPitch + k]};
            mma_16x8x4(d, rows_of_a, right[tile_step * c + k]);
          }
          spill_back(c, s, d);
        }
#pragma unroll kGramUnroll
      for (int k = 0; k < kSlabDepth; k += 4) {
        double rows_of_a[Config::strips][2];
#pragma unroll
        for (int s = 0; s < Config::strips; ++s) {
          rows_of_a[s][0] = left[strip_step * s + k];
          rows_of_a[s][1] = left[strip_step * s + lower * kSlabPitch + k];
        }
#pragma unroll
        for (int c = Config::spilled_tiles; c < Config::tiles; ++c) {
          const double b = right[tile_step * c + k];
#pragma unroll
          for (int s = 0; s < Config::strips; ++s) mma_16x8x4(a[c - Config::spilled_tiles][s], rows_of_a[s], b);
        }
      }
      __syncthreads();
    }
  }

  // A ready matrix; both triangles from the lower one.
  __device__ __forceinline__ void read(const RealMatrix& source) {
    each_tile([&](double (&d)[4], int c, int s) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[e] = source(row(s) + e / 2 * lower, 8 * tile_of(c) + lane() % 4 * 2 + e % 2);
    });
  }

  // The block's largest magnitude; infinite where a value is not finite. shared: a double for each warp.
  __device__ __forceinline__ double largest(double* shared) {
    double most = 0.0;
    bool finite = true;
    each_tile([&](double (&d)[4], int, int) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        finite = finite && isfinite(d[e]);
        most = fmax(most, fabs(d[e]));
      }
    });
    most = warp_max(most);
    if (lane() == 0) shared[warp()] = most;
    if (!__syncthreads_and(finite)) return INFINITY;
    for (int w = 0; w < Config::warps; ++w) most = fmax(most, shared[w]);
    return most;
  }

  // Scales the matrix's largest magnitude into [1, 2) and returns log2 of what was taken out; kNonfinite where it is
  // not finite.
  static constexpr int kNonfinite = 1 << 20;
  __device__ __forceinline__ int scale(double most) {
    if (!isfinite(most)) return kNonfinite;
    const int exponent = most > 0.0 ? ilogb(most) : 0;
    // In two steps: 2^-exponent itself may be out of range.
    const double half = scalbn(1.0, -exponent / 2), rest = scalbn(1.0, -exponent + exponent / 2);
    each_tile([&](double (&d)[4], int, int) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[e] = d[e] * half * rest;
    });
    return exponent;
  }

  // The first column's elements in the block's rows, into `column`.
  __device__ __forceinline__ void first_column(double* column) const {
    if (column_group() != 0) return;
#pragma unroll
    for (int s = 0; s < Config::strips; ++s) {
      double first[4];
      if (Config::spilled_tiles > 0) {
        unspill(0, s, first);
        hand_on(first, 0, s, column);
      } else {
        hand_on(a[0][s], 0, s, column);
      }
    }
  }

  // Takes v w^T + w v^T out of the matrix, multiplies it by u, and writes what is then its column `next`, and the
  // product of the warp's columns, an element for each of the block's rows. What comes before `next` is done with.
  __device__ __forceinline__ void pass(int next, const double* v, const double* w, const double* u, double* column,
                                       double* product) {
    static_assert(Config::strips <= 2, "the first strip, and the last one");
    constexpr int ends_first = Config::cluster_blocks > 1 ? 0 : Config::strips - 1;
    if (rows_after(next - 1, ends_first))
      pass_from<0>(next, v, w, u, column, product);
    else if (ends_first < Config::strips - 1 && rows_after(next - 1, Config::strips - 1))
      pass_from<Config::strips - 1 - ends_first>(next, v, w, u, column, product);
  }

 private:
  // The strips before `From` are done with.
  template <int From>
  __device__ __forceinline__ void pass_from(int next, const double* v, const double* w, const double* u, double* column,
                                            double* product) {
    const int t = lane() % 4;
    Rows of[Config::strips];
    double sum[Config::strips][4] = {};
#pragma unroll
    for (int s = From; s < Config::strips; ++s) of[s] = Rows(v, w, row(s));
    const auto work = [&](double (&d)[4], int s, const Columns& at) {
      update(d, of[s], at);
      sum[s][0] = fma(d[0], at.u.x, sum[s][0]);
      sum[s][1] = fma(d[1], at.u.y, sum[s][1]);
      sum[s][2] = fma(d[2], at.u.x, sum[s][2]);
      sum[s][3] = fma(d[3], at.u.y, sum[s][3]);
    };
    // The tiles before the next pivot's are done. Those in registers go several at a time, so that more loads and
    // products are under way.
    const int first = (next / 8 + Config::column_groups - 1 - column_group()) / Config::column_groups;
    const bool holds_next = tile_of(first) == next / 8;
#pragma unroll
    for (int c = 0; c < Config::spilled_tiles; c += kSpillsTogether)
      if (c + kSpillsTogether - 1 >= first) {
        constexpr int most = kSpillsTogether;
        Columns at[most];
        double d[most][Config::strips][4];
#pragma unroll
        for (int i = 0; i < most && c + i < Config::spilled_tiles; ++i) {
          at[i] = Columns(tile_of(c + i), v, w, u);
#pragma unroll
          for (int s = From; s < Config::strips; ++s) unspill(c + i, s, d[i][s]);
        }
#pragma unroll
        for (int i = 0; i < most && c + i < Config::spilled_tiles; ++i)
#pragma unroll
          for (int s = From; s < Config::strips; ++s) {
            work(d[i][s], s, at[i]);
            spill_back(c + i, s, d[i][s]);
          }
#pragma unroll
        for (int i = 0; i < most && c + i < Config::spilled_tiles; ++i)
          if (c + i == first && holds_next)
#pragma unroll
            for (int s = From; s < Config::strips; ++s) hand_on(d[i][s], next, s, column);
      }
#pragma unroll
    for (int c = Config::spilled_tiles; c < Config::tiles; c += kTogether)
      if (c + kTogether - 1 >= first) {
        Columns at[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) at[i] = Columns(tile_of(c + i < Config::tiles ? c + i : c), v, w, u);
#pragma unroll
        for (int i = 0; i < kTogether && c + i < Config::tiles; ++i)
#pragma unroll
          for (int s = From; s < Config::strips; ++s) work(a[c + i - Config::spilled_tiles][s], s, at[i]);
      }
    if (first >= Config::spilled_tiles && holds_next)
      hand_on_tile<From, Config::spilled_tiles, Config::tiles>(first, next, column);
    // Four lanes share a row: the upper two of them end up with the lower row's sum.
#pragma unroll
    for (int s = From; s < Config::strips; ++s) {
      const double above = sum[s][0] + sum[s][1], below = sum[s][2] + sum[s][3];
      double total = t & 2 ? below : above;
      total += __shfl_xor_sync(kAllLanes, t & 2 ? above : below, 2);
      total += __shfl_xor_sync(kAllLanes, total, 1);
      if ((t & 1) == 0) product[own_row(s) + 4 * t] = total;
    }
  }

  __device__ __forceinline__ void unspill(int c, int s, double (&d)[4]) const {
    const double2 upper = spill.a[c][s][0][threadIdx.x], lower = spill.a[c][s][1][threadIdx.x];
    d[0] = upper.x, d[1] = upper.y, d[2] = lower.x, d[3] = lower.y;
  }

  __device__ __forceinline__ void spill_back(int c, int s, const double (&d)[4]) {
    spill.a[c][s][0][threadIdx.x] = make_double2(d[0], d[1]);
    spill.a[c][s][1][threadIdx.x] = make_double2(d[2], d[3]);
  }

  // change(elements, tile, strip).
  template <typename Change>
  __device__ __forceinline__ void each_tile(const Change& change) {
#pragma unroll
    for (int c = 0; c < Config::tiles; ++c)
#pragma unroll
      for (int s = 0; s < Config::strips; ++s) {
        if (c < Config::spilled_tiles) {
          double d[4];
          unspill(c, s, d);
          change(d, c, s);
          spill_back(c, s, d);
        } else {
          change(a[c - Config::spilled_tiles][s], c, s);
        }
      }
  }

  // A strip's and a tile's elements of the vectors, and v w^T + w v^T taken out of a tile with them. With tensor cores
  // it is a product of depth 2, of which each lane holds one element of the columns instead of four: loading those is
  // what a pass would wait for.
#if __CUDA_ARCH__ >= 800
  struct Rows {
    double a[2];
    Rows() = default;
    __device__ __forceinline__ Rows(const double* v, const double* w, int row) {
      const double* from = lane() & 1 ? w : v;
      a[0] = lane() & 2 ? 0.0 : -from[row];
      a[1] = lane() & 2 ? 0.0 : -from[row + lower];
    }
  };
  struct Columns {
    double b;
    double2 u;
    Columns() = default;
    __device__ __forceinline__ Columns(int tile, const double* v, const double* w, const double* u_all)
        : b((lane() & 1 ? v : w)[8 * tile + lane() / 4]),
          u(reinterpret_cast<const double2*>(u_all)[4 * tile + lane() % 4]) {}
  };
  static __device__ __forceinline__ void update(double (&d)[4], const Rows& of, const Columns& at) {
    mma_16x8x4(d, of.a, at.b);
  }
#else
  struct Rows {
    double v0, v1, w0, w1;
    Rows() = default;
    __device__ __forceinline__ Rows(const double* v, const double* w, int row)
        : v0(v[row]), v1(v[row + lower]), w0(w[row]), w1(w[row + lower]) {}
  };
  struct Columns {
    double2 v, w, u;
    Columns() = default;
    __device__ __forceinline__ Columns(int tile, const double* v_all, const double* w_all, const double* u_all) {
      const int at = 4 * tile + lane() % 4;
      v = reinterpret_cast<const double2*>(v_all)[at];
      w = reinterpret_cast<const double2*>(w_all)[at];
      u = reinterpret_cast<const double2*>(u_all)[at];
    }
  };
  static __device__ __forceinline__ void update(double (&d)[4], const Rows& of, const Columns& at) {
    d[0] = fma(-of.w0, at.v.x, fma(-of.v0, at.w.x, d[0]));
    d[1] = fma(-of.w0, at.v.y, fma(-of.v0, at.w.y, d[1]));
    d[2] = fma(-of.w1, at.v.x, fma(-of.v1, at.w.x, d[2]));
    d[3] = fma(-of.w1, at.v.y, fma(-of.v1, at.w.y, d[3]));
  }
#endif

  // A column out of a tile in registers, of those from First to End.
  template <int From, int First, int End>
  __device__ __forceinline__ void hand_on_tile(int tile, int next, double* column) const {
    if constexpr (End - First > 1) {
      if (tile < (First + End) / 2)
        hand_on_tile<From, First, (First + End) / 2>(tile, next, column);
      else
        hand_on_tile<From, (First + End) / 2, End>(tile, next, column);
    } else {
#pragma unroll
      for (int s = From; s < Config::strips; ++s) hand_on(a[First - Config::spilled_tiles][s], next, s, column);
    }
  }

  // A column out of the tile that holds it.
  static __device__ __forceinline__ void hand_on(const double (&d)[4], int next, int s, double* column) {
    if (lane() % 4 == next % 8 / 2) {
      column[own_row(s)] = next & 1 ? d[1] : d[0];
      column[own_row(s) + 8] = next & 1 ? d[3] : d[2];
    }
  }
};

}  // namespace one_stage
}  // namespace farms_fast
