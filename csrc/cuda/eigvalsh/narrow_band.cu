// Band of half-width 32 to half-width 4. A sweep makes four columns narrow by four Householder reflectors and chases
// the bulge down the band, 32 columns a step; a warp runs one sweep, the warps of a matrix follow each other at a safe
// distance. A step's blocks stay in registers, as the accumulators of products on the tensor cores in float64, and the
// four reflectors of a step go in together, I - V T V^T.
//
// A warp waits for one other only, the one before it in the ring of a matrix's warps, whose last sweep is the one
// before its own, and only for steps of that. Sweep 0 waits for nothing, so by induction over sweeps and steps some
// warp can always go on; and all of them run, since a block, a cluster of blocks or a cooperative grid starts as a
// whole, and a warp that spins sleeps in between. See narrow_kernel for the flags.
#include "csrc/cuda/eigvalsh/async_copy.cuh"
#include "csrc/cuda/eigvalsh/block_reflector.cuh"
#include "csrc/cuda/eigvalsh/cluster_exchange.cuh"
#include "csrc/cuda/eigvalsh/cluster_launch.h"
#include "csrc/cuda/eigvalsh/grid_flags.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"
#include "csrc/cuda/hopper.h"

namespace farms_fast {
namespace {

constexpr int kStepsLimit = 1 << 12;  // more than the steps of a sweep

// How the warps of a matrix see what the others wrote: in one block through their multiprocessor's L1, in several
// through the L2. Eight warps fill the registers of a multiprocessor: 255 a thread, of which 128 are for the two blocks
// of a step.
struct NarrowInBlock {
  static constexpr bool several_blocks = false, cluster = false;
  static constexpr int max_warps = 8;
};
struct NarrowInCluster {
  static constexpr bool several_blocks = true, cluster = true;
  static constexpr int max_warps = 8;
};
struct NarrowInGrid {
  static constexpr bool several_blocks = true, cluster = false;
  static constexpr int max_warps = 8;
};
static_assert(NarrowInGrid::max_warps * hopper::kMaxClusterBlocks <= kMostFlags);

// The 64 rows and 32 columns of the band from a step's first diagonal element on. See wide_index; a step further down
// the tiles of a column have changed places with those 32 rows below them.
template <class Config>
struct BandSlice {
  static constexpr int kHalf = kWideBand * kBandTile, kColumns = kBandTile * kWideColumn;  // doubles
  double* begin;
  // Of the lane's part of an 8 x 8 block in the columns from 0 on: rows 8 j + 2 t, column g; row 8 m + g, column 2 t.
  int across[4], down[4];

  __device__ __forceinline__ BandSlice(double* band, int first, const FragmentLane& at)
      : begin(band + first / kBandTile * static_cast<int64_t>(kColumns)) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      across[j] = static_cast<int>(wide_index(first % kWideColumn + 8 * j + 2 * at.t, at.g));
      down[j] = static_cast<int>(wide_index(first % kWideColumn + 8 * j + at.g, 2 * at.t));
    }
  }
  __device__ __forceinline__ void advance() {
    begin += kWideBand / kBandTile * kColumns;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      across[j] ^= kHalf;
      down[j] ^= kHalf;
    }
  }

  // Half 0: the diagonal block; 1: the block below. Rows 8 j + 2 t and the next one, column 8 m + g.
  template <int Half>
  __device__ __forceinline__ double* pair_at(int j, int m) const {
    return begin + (across[j] ^ Half * kHalf) + m * 2 * kColumns;
  }
  // Row 8 m + g, column 8 j + 2 t + s.
  template <int Half>
  __device__ __forceinline__ double* one_at(int m, int j, int s) const {
    return begin + (down[m] ^ Half * kHalf) + j * 2 * kColumns + s * kBandTile;
  }
  // Row 8 m + g, column t.
  template <int Half>
  __device__ __forceinline__ double* row_at(int m, const FragmentLane& at) const {
    return one_at<Half>(m, 0, 0) + at.t * kBandTile - (at.t / 2 * kColumns + at.t % 2 * 2 * kBandTile);
  }
  __device__ __forceinline__ double load(const double* from) const {
    return Config::several_blocks ? __ldcg(from) : *from;
  }
  __device__ __forceinline__ void load_pair(const double* from, double* to) const {
    const double2 pair = Config::several_blocks ? __ldcg(reinterpret_cast<const double2*>(from))
                                                : *reinterpret_cast<const double2*>(from);
    to[0] = pair.x;
    to[1] = pair.y;
  }
  __device__ __forceinline__ void store(double* to, double value) const {
    if (Config::several_blocks)
      __stcg(to, value);
    else
      *to = value;
  }
  __device__ __forceinline__ void store_pair(double* to, const double* from) const {
    const double2 pair = make_double2(from[0], from[1]);
    if (Config::several_blocks)
      __stcg(reinterpret_cast<double2*>(to), pair);
    else
      *reinterpret_cast<double2*>(to) = pair;
  }
};

// Orders what this thread wrote or read before and after, for the warps that work on the same matrix.
template <class Config>
__device__ __forceinline__ void fence() {
  if constexpr (Config::several_blocks)
    __threadfence();
  else
    __threadfence_block();
}

// The first four columns once they are triangular: zeros, and the triangle in the corner.
template <class Config, int Half>
__device__ __forceinline__ void store_triangle(const BandSlice<Config>& slice, const FragmentLane& at, double corner,
                                               int tiles_before) {
  const double zeros[2] = {};
  if (at.g >= kNarrowBand) return;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j > 0 || at.t >= kNarrowBand / 2)
      slice.store_pair(slice.template pair_at<Half>(j, 0) - tiles_before * slice.kColumns, zeros);
  slice.store(slice.template row_at<Half>(0, at) - tiles_before * slice.kColumns, corner);
}

// The reflectors of the sweep's first four columns, which are those before the slice's and become narrow.
template <class Config>
__device__ __forceinline__ void begin_sweep(const BandSlice<Config>& slice, const FragmentLane& at,
                                            ReflectorExchange& exchange, Reflectors& reflectors) {
  double x[4], corner;
#pragma unroll
  for (int m = 0; m < 4; ++m) x[m] = slice.load(slice.template row_at<0>(m, at) - slice.kColumns);
  factor(x, at, exchange, reflectors, corner);
  store_triangle<Config, 0>(slice, at, corner, 1);
}

// The diagonal block, of which only the lower triangle is kept up to date.
template <class Config>
__device__ __forceinline__ void load_diagonal(const BandSlice<Config>& slice, const FragmentLane& at,
                                              double (&d)[2][4][4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      double* pair = &d[m / 2][j][m % 2 * 2];
      if (m < j) {
        slice.load_pair(slice.template pair_at<0>(j, m), pair);
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const bool mirrored = m > j || 2 * at.t + s < at.g;
          pair[s] = slice.load(mirrored ? slice.template one_at<0>(m, j, s) : slice.template pair_at<0>(j, m) + s);
        }
      }
    }
}
template <class Config>
__device__ __forceinline__ void store_diagonal(const BandSlice<Config>& slice, const FragmentLane& at,
                                               const double (&d)[2][4][4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int j = m; j < 4; ++j) {
      const double* pair = &d[m / 2][j][m % 2 * 2];
      double* to = slice.template pair_at<0>(j, m);
      if (m < j) {
        slice.store_pair(to, pair);
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s)
          if (2 * at.t + s >= at.g) slice.store(to + s, pair[s]);
      }
    }
}

// Its lower triangle, reflected from both sides.
__device__ __forceinline__ void reflect_diagonal(double (&d)[2][4][4], const FragmentLane& at,
                                                 const Reflectors& reflectors) {
  // W = D V T - V M with M = T^T V^T D V T / 2, which is symmetric.
  double product[4], minus_w[4], sum[2][4] = {}, inner[4] = {}, middle[4] = {};
  multiply(d, reflectors.deep, product);
  const double gram = multiply_transposed(reflectors.row, product, at);
  const double zero = 0.0, t_left[2] = {0.5 * from_lane(reflectors.minus_t, at.lane & ~4), zero};
  mma_16x8x4(inner, t_left, at.g % 2 == 0 ? gram : 0.0);
  const double inner_left[2] = {inner[0], zero};
  mma_16x8x4(middle, inner_left, reflectors.minus_t);
  multiply_square(product, reflectors.minus_t, sum);
  multiply_square(reflectors.row, at.g % 2 == 0 ? middle[0] : 0.0, sum);
#pragma unroll
  for (int m = 0; m < 4; ++m) minus_w[m] = row_of(sum, m);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    add_outer(d[i], reflectors.row, minus_w, i, 2 * i);
    add_outer(d[i], minus_w, reflectors.row, i, 2 * i);
  }
}

// One step: the diagonal block, the block below it from the right, and that from the left by its own first four
// columns' reflectors, which are the next step's. Calls ready() once the part is written that the next sweep's step
// before this one takes, all but the columns after the fourth of the block below.
template <class Config, typename F>
__device__ __forceinline__ void step(const BandSlice<Config>& slice, const FragmentLane& at,
                                     ReflectorExchange& exchange, Reflectors& reflectors, const F& ready) {
  // All of it is read before any is written: the compiler holds reads behind writes. Of the block below, B, its
  // transpose and its product with V.
  double d[2][4][4], e[2][4][4], y[4], sum[2][4] = {}, right[4];
  load_diagonal(slice, at, d);
  {
    double b[2][4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int s = 0; s < 2; ++s) b[m / 2][j][m % 2 * 2 + s] = slice.load(slice.template one_at<1>(m, j, s));
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) slice.load_pair(slice.template pair_at<1>(j, m), &e[m / 2][j][m % 2 * 2]);
    multiply(b, reflectors.deep, y);
  }
  reflect_diagonal(d, at, reflectors);
  store_diagonal(slice, at, d);

  multiply_square(y, reflectors.minus_t, sum);
#pragma unroll
  for (int m = 0; m < 4; ++m) right[m] = row_of(sum, m);
#pragma unroll
  for (int i = 0; i < 2; ++i) add_outer(e[i], reflectors.row, right, i, 0);

  // Its first four columns, as a 32 x 4 matrix.
  __syncwarp();
  if (at.g < kNarrowBand)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *reinterpret_cast<double2*>(&exchange.v[at.g][8 * j + 2 * at.t]) = make_double2(e[0][j][0], e[0][j][1]);
  __syncwarp();
  double x[4], corner;
#pragma unroll
  for (int m = 0; m < 4; ++m) x[m] = exchange.v[at.t][8 * m + at.g];
  factor(x, at, exchange, reflectors, corner);
  store_triangle<Config, 1>(slice, at, corner, 0);
  ready();

  double u[4], minus_u[2][4] = {};
  multiply(e, reflectors.deep, u);
  multiply_square(u, reflectors.minus_t, minus_u);
#pragma unroll
  for (int m = 0; m < 4; ++m) u[m] = row_of(minus_u, m);
#pragma unroll
  for (int i = 0; i < 2; ++i) add_outer(e[i], u, reflectors.row, i, 0);
#pragma unroll
  for (int m = 0; m < 4; ++m)
    if (m > 0 || at.g >= kNarrowBand)
#pragma unroll
      for (int j = 0; j < 4; ++j) slice.store_pair(slice.template pair_at<1>(j, m), &e[m / 2][j][m % 2 * 2]);
}

// grid: (blocks of a cluster, matrices). bands: (batch, wide_count(order)), narrowed in place. The warps of a matrix
// take the sweeps in turn. Warp w's progress: its sweep times kStepsLimit, plus the steps that it is ready with; step t
// of a sweep needs step t + 1 of the sweep before. It only grows, and it is kept in the shared memory of the block that
// waits for it, the next warp's; inside of a block by atomic operations, which is how a checker of races can tell it
// from data. In a grid without clusters it is in `flags` (batch, kMostFlags), -1 before. Dynamic shared memory: a
// ReflectorExchange and a flag for each warp.
template <class Config>
__global__ void __launch_bounds__(Config::max_warps * 32, 1)
    narrow_kernel(double* __restrict__ bands, int order, int* flags) {
  extern __shared__ __align__(16) double shared_memory[];
  const int block_warps = static_cast<int>(blockDim.x) / 32, block_warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = block_warps * static_cast<int>(gridDim.x);
  const int warp = static_cast<int>(blockIdx.x) * block_warps + block_warp;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const FragmentLane at = {lane, lane / 4, lane % 4};
  ReflectorExchange& exchange = reinterpret_cast<ReflectorExchange*>(shared_memory)[block_warp];
  double* band = bands + blockIdx.y * wide_count(order);
  // Of the warp before each of this block's.
  int* progress = reinterpret_cast<int*>(reinterpret_cast<ReflectorExchange*>(shared_memory) + block_warps);
  int* grid_progress = flags + blockIdx.y * kMostFlags;  // of the warp before each of the matrix
  if (lane == 0) progress[block_warp] = -1;
  if constexpr (Config::cluster)
    cluster_sync();
  else
    __syncthreads();

  const int next = (warp + 1) % warps;
  // Every lane's writes come before the flag's: each fences its own, and lane 0 writes after all of them.
  const auto tell = [&](int value) {
    fence<Config>();
    __syncwarp();
    if (lane == 0) {
      if constexpr (Config::cluster)
        cluster_store(progress + next % block_warps, next / block_warps, value);
      else if constexpr (Config::several_blocks)
        grid_store(grid_progress + next, value);
      else
        atomicExch(progress + next, value);
    }
  };
  for (int sweep = warp; sweep * kNarrowBand + kNarrowBand + 1 < order; sweep += warps) {
    // Until the sweep before has so many steps ready; it will, see the head of this file.
    const auto wait = [&](int steps_before) {
      if (sweep == 0) return;
      const int needed = (sweep - 1) * kStepsLimit + steps_before;
      if constexpr (Config::several_blocks) {
        const auto told = [&] {
          return Config::cluster ? cluster_flag(progress + block_warp) : grid_flag(grid_progress + warp);
        };
        if (lane == 0)
          while (told() < needed) __nanosleep(20);
        __syncwarp();
      } else {
        if (lane == 0)
          while (atomicMax(progress + block_warp, -1) < needed) __nanosleep(20);  // never less than that
        __syncwarp();
        __threadfence_block();
      }
    };
    const int first = (sweep + 1) * kNarrowBand;
    const int steps = (order - first + kWideBand - 1) / kWideBand;
    Reflectors reflectors;
    wait(1);
    BandSlice<Config> slice(band, first, at);
    begin_sweep(slice, at, exchange, reflectors);
    for (int i = 0; i < steps; ++i) {
      wait(i + 2);
      step(slice, at, exchange, reflectors, [&] { tell(sweep * kStepsLimit + i + 1); });
      slice.advance();
    }
    // Every step of the sweep after is free to go.
    tell(sweep * kStepsLimit + kStepsLimit - 1);
  }
  // A block's shared memory must outlive the stores of the others.
  if constexpr (Config::cluster) cluster_sync();
}

// grid: (blocks of rows of the band, matrices). gram: (batch, order, order). band: (batch, wide_count(order)).
__global__ void extract_kernel(const double* __restrict__ gram, int order, double* __restrict__ band) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int row = static_cast<int>(at / kWideColumn), offset = static_cast<int>(at % kWideColumn);
  if (at >= wide_count(order)) return;
  double* out = band + blockIdx.y * wide_count(order);
  // Threads run along a row of the matrix, which is where it is contiguous; each zero is written in place.
  const int column = row - kWideBand + offset;
  if (offset <= kWideBand && column >= 0) {
    const double value = row < order ? gram[(static_cast<int64_t>(blockIdx.y) * order + row) * order + column] : 0.0;
    out[wide_index(row, column)] = value;
  }
  // Column `row` from here on: the rest of its tiles, and what lies past the last row.
  const int below = row + offset;
  if (below / kBandTile < row / kBandTile + kWideColumn / kBandTile &&
      (offset > kWideBand || below >= wide_columns(order)))
    out[wide_index(below, row)] = 0;
}

}  // namespace

void extract_band(const double* gram, int batch, int order, double* band, cudaStream_t stream) {
  constexpr int threads = 256;
  const int64_t elements = wide_count(order);
  const dim3 grid(static_cast<unsigned>((elements + threads - 1) / threads), static_cast<unsigned>(batch));
  extract_kernel<<<grid, threads, 0, stream>>>(gram, order, band);
  FARMS_LAUNCH_CHECK();
}

void narrow_band(double* band, int batch, int order, int* flags, const CudaDevice& device, cudaStream_t stream) {
  // More warps than sweeps that can be under way find nothing to do. Many matrices share a multiprocessor, two of them
  // with four warps each; a few large ones are spread over several.
  const int useful = (order / kWideBand + 1) / 2 + 1;
  constexpr int max_warps = NarrowInBlock::max_warps;
  int warps = batch > device.processors ? max_warps / 2 : max_warps, blocks = 1;
  while (blocks < hopper::kMaxClusterBlocks && blocks * warps < useful && 2 * blocks * batch <= device.processors)
    blocks *= 2;
  warps = useful < warps ? useful : warps;
  const bool in_clusters = blocks <= device.cluster_blocks;
  const auto kernel = blocks == 1   ? narrow_kernel<NarrowInBlock>
                      : in_clusters ? narrow_kernel<NarrowInCluster>
                                    : narrow_kernel<NarrowInGrid>;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
  ClusterLaunch launch(kernel, grid, grid.x, static_cast<unsigned>(warps) * 32,
                       warps * (sizeof(ReflectorExchange) + sizeof(int)), stream);
  if (!in_clusters) {
    clear_flags(flags, static_cast<int64_t>(batch) * kMostFlags, stream);
    launch.run_grid_at_once();
  }
  FARMS_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, band, order, flags));
}

}  // namespace farms_fast
