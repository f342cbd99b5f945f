// Householder QR of one panel of every matrix. A cluster of thread blocks holds a panel in registers, rows spread over
// its warps: a thread keeps 4 rows x 8 columns, 8 x 4 threads make a warp's 32 rows x 32 columns.
//
//   lane l has, of its warp's 32 x 32, rows 4 (l / 4) + 0..3 and columns 8 (l % 4) + 0..7
//
//   columns:      0..7  8..15  16..23  24..31
//   rows  0..3    l0    l1     l2      l3
//   rows  4..7    l4    l5     l6      l7
//   ..
//   rows 28..31   l28   l29    l30     l31
//
// One reduction per column gives the norm, the products with the columns to the right and the products with the vectors
// to the left, which make T. Its sums go from the lanes of a warp to the warps of a block (a barrier) to the blocks of
// the cluster: each sends its sums to all (st.async), and each waits for those of all. What it waits for is sent by
// blocks that run, since a cluster starts as one, and that have waited for no later column themselves. Without
// clusters see panel_qr_block.cu.
#include "csrc/cuda/eigvalsh/async_copy.cuh"
#include "csrc/cuda/eigvalsh/cluster_exchange.cuh"
#include "csrc/cuda/eigvalsh/cluster_launch.h"
#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"
#include "csrc/cuda/hopper.h"
#include "csrc/cuda/warp.cuh"

namespace farms_fast {
namespace {

// A panel whose rows a cluster holds. Two blocks of eight warps share a multiprocessor, or one of sixteen has it: 128
// registers a thread either way, of which 64 are for its elements.
struct ShortPanel {
  static constexpr int warps = 8, blocks_per_processor = 2;
  static constexpr bool keeps_rows = true;  // all of them in registers
};
struct TallPanel {
  static constexpr int warps = 16, blocks_per_processor = 1;
  static constexpr bool keeps_rows = true;
};
// Of a longer one the cluster keeps the first rows; those beyond go through the registers at every column, from v's
// memory and back.
struct EndlessPanel {
  static constexpr int warps = 16, blocks_per_processor = 1;
  static constexpr bool keeps_rows = false;
};

template <class Config>
constexpr int kRowsOfBlock = 32 * Config::warps;
template <class Config>
struct PanelShared {
  double warp_sums[2][Config::warps]
                  [kWideBand];  // double buffered: a column's sums are read while the next one's are written
  double block_sums[2][hopper::kMaxClusterBlocks][kWideBand];
  double own_pivot[2][kWideBand];
  double pivot[2][kWideBand];
  ArrivalBarrier arrived[2];              // of block_sums and pivot
  double products[kWideBand][kWideBand];  // [l][j] = v_l . v_j for l < j
  double tau[kWideBand];

  static_assert(2 * 4 * 8 + 64 <= hopper::registers_per_thread(Config::warps, Config::blocks_per_processor),
                "a thread's elements, and as much to work with");
};

struct PanelLane {
  int lane, row_group, column_group;
};

// Eight doubles aligned to 16 bytes.
__device__ __forceinline__ void read(double (&out)[8], const double* from) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const double2 pair = reinterpret_cast<const double2*>(from)[q];
    out[2 * q] = pair.x;
    out[2 * q + 1] = pair.y;
  }
}
__device__ __forceinline__ void write(const double (&in)[8], double* to) {
#pragma unroll
  for (int q = 0; q < 4; ++q) reinterpret_cast<double2*>(to)[q] = make_double2(in[2 * q], in[2 * q + 1]);
}

// x[i] of column j (register jj of the threads in column group jg), zero above row j; sums[q] += x . a[.][q].
template <int jj>
__device__ __forceinline__ void multiply(const double (&a)[4][8], const PanelLane& at, int jg, int row, double (&x)[4],
                                         double (&sums)[8]) {
  const int j = jg * 8 + jj;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = __shfl_sync(kAllLanes, a[i][jj], (at.lane & ~3) | jg);
    if (row + i < j) x[i] = 0;
#pragma unroll
    for (int q = 0; q < 8; ++q) sums[q] += x[i] * a[i][q];
  }
}

template <int jj>
__device__ __forceinline__ void reflect(double (&a)[4][8], const PanelLane& at, int jg, int row, const double (&x)[4],
                                        const Reflector& reflector, const double (&coefficient)[8]) {
  const int j = jg * 8 + jj;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double v = row + i > j ? x[i] * reflector.scale : (row + i == j ? 1.0 : 0.0);
#pragma unroll
    for (int q = 0; q < 8; ++q) a[i][q] -= v * coefficient[q];
    if (at.column_group == jg && row + i >= j) a[i][jj] = row + i == j ? reflector.beta : v;
  }
}

// What one thread knows of its panel.
template <class Config>
struct PanelRows {
  double* matrix;
  double* v;  // of this matrix, from the panel's first row on
  int order, column, rows, stored_rows;
  int cluster, rank, warp;
  PanelLane at;
  PanelShared<Config>* shared;

  __device__ int stride() const { return cluster * kRowsOfBlock<Config>; }
  // Calls f with the thread's first row of each 32 that its warp has beyond those in registers.
  template <typename F>
  __device__ void for_more(const F& f) const {
    if constexpr (!Config::keeps_rows)
      for (int more = stride(); warp_row() + more < stored_rows; more += stride())
        f(warp_row() + at.row_group * 4 + more);
  }
  __device__ int warp_row() const { return (rank * Config::warps + warp) * 32; }

  __device__ void load(double (&a)[4][8], int row) const {
    const int first = column + kWideBand;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double* from = matrix + static_cast<int64_t>(first + row + i) * order + column + at.column_group * 8;
      if (row + i >= rows) {
#pragma unroll
        for (int q = 0; q < 8; ++q) a[i][q] = 0;
      } else if (order % 2 == 0) {
        read(a[i], from);
      } else {
#pragma unroll
        for (int q = 0; q < 8; ++q) a[i][q] = from[q];
      }
    }
  }
  __device__ void load_stored(double (&a)[4][8], int row) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) read(a[i], v + (row + i) * kWideBand + at.column_group * 8);
  }
  __device__ void store(const double (&a)[4][8], int row) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) write(a[i], v + (row + i) * kWideBand + at.column_group * 8);
  }
  // The vectors with their ones and zeros, the triangle into the matrix.
  __device__ void finish(const double (&a)[4][8], int row, int reflectors) const {
    const int first = column + kWideBand;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      double out[8];
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const int l = at.column_group * 8 + q, r = row + i;
        const double one = l < reflectors ? 1.0 : 0.0;
        out[q] = r > l ? a[i][q] : (r == l ? one : 0.0);
        if (r <= l && r < rows) matrix[static_cast<int64_t>(first + r) * order + column + l] = a[i][q];
      }
      write(out, v + (row + i) * kWideBand + at.column_group * 8);
    }
  }

  template <int jj>
  __device__ void step(double (&a)[4][8], int jg) const {
    const int j = jg * 8 + jj, parity = jj & 1;
    const int row = warp_row() + at.row_group * 4;
    double x[4], sums[8] = {};
    multiply<jj>(a, at, jg, row, x, sums);
    for_more([&](int more) {
      double b[4][8], y[4];
      load_stored(b, more);
      multiply<jj>(b, at, jg, more, y, sums);
    });
    // Sums over the row groups; each exchange also halves the columns, so that a thread ends with one of its eight.
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = (at.row_group & half) != 0;
#pragma unroll
      for (int q = 0; q < half; ++q) {
        const double keep = upper ? sums[q + half] : sums[q], give = upper ? sums[q] : sums[q + half];
        sums[q] = keep + __shfl_xor_sync(kAllLanes, give, half * 4);
      }
    }
    shared->warp_sums[parity][warp][at.column_group * 8 + at.row_group] = sums[0];
    if (rank == 0 && warp == 0 && at.row_group == j / 4)
#pragma unroll
      for (int q = 0; q < 8; ++q) shared->own_pivot[parity][at.column_group * 8 + q] = a[jj % 4][q];
    __syncthreads();

    double sum = 0, pivot;
    if (cluster == 1) {
#pragma unroll
      for (int i = 0; i < Config::warps; ++i) sum += shared->warp_sums[parity][i][at.lane];
      pivot = shared->own_pivot[parity][at.lane];
    } else {
      // No block is two columns ahead of another: what it sends next waits for what that one sent before. So two of
      // each buffer are enough, and a barrier is in the phase after when it is waited for again.
      if (threadIdx.x == 0)
        expect_bytes(shared->arrived[parity], (cluster + 1) * kWideBand * static_cast<int>(sizeof(double)));
      if (warp < cluster) {
        double own = 0;
#pragma unroll
        for (int i = 0; i < Config::warps; ++i) own += shared->warp_sums[parity][i][at.lane];
        ArrivalBarrier& arrived = shared->arrived[parity];
        send(&shared->block_sums[parity][rank][at.lane], arrived, warp, own);
        if (rank == 0) send(&shared->pivot[parity][at.lane], arrived, warp, shared->own_pivot[parity][at.lane]);
      }
      wait_arrival(shared->arrived[parity], j / 2 % 2);
      for (int i = 0; i < cluster; ++i) sum += shared->block_sums[parity][i][at.lane];
      pivot = shared->pivot[parity][at.lane];
    }

    const double norm2 = __shfl_sync(kAllLanes, sum, j), alpha = __shfl_sync(kAllLanes, pivot, j);
    const Reflector reflector = make_reflector(alpha, norm2);
    const double product = reflector.scale * (sum - reflector.beta * pivot);
    if (rank == 0 && warp == 0) {
      if (at.lane < j) shared->products[at.lane][j] = product;
      if (at.lane == j) shared->tau[j] = reflector.tau;
    }
    const double own = at.lane > j ? reflector.tau * product : 0.0;
    double coefficient[8];
#pragma unroll
    for (int q = 0; q < 8; ++q) coefficient[q] = __shfl_sync(kAllLanes, own, at.column_group * 8 + q);
    reflect<jj>(a, at, jg, row, x, reflector, coefficient);
    for_more([&](int more) {
      double b[4][8], y[4], unused[8] = {};
      load_stored(b, more);
      multiply<jj>(b, at, jg, more, y, unused);
      reflect<jj>(b, at, jg, more, y, reflector, coefficient);
      store(b, more);
    });
  }
};

// T's row of this lane: t_j = -tau_j (t . (V^T v_j)).
template <class Config>
__device__ void write_t(const PanelShared<Config>& shared, int lane, double* __restrict__ t) {
  double row[kWideBand];
#pragma unroll
  for (int j = 0; j < kWideBand; ++j) {
    double sum[4] = {};
#pragma unroll
    for (int l = 0; l < j; ++l) sum[l % 4] += row[l] * shared.products[l][j];
    const double above = -shared.tau[j] * ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    row[j] = j > lane ? above : (j == lane ? shared.tau[j] : 0.0);
    t[lane * kWideBand + j] = row[j];
  }
}

// grid: (blocks of a cluster, matrices). Shapes as in two_stage.h. Dynamic shared memory: a PanelShared.
template <class Config>
__global__ void __launch_bounds__(Config::warps * 32, Config::blocks_per_processor)
    panel_qr_kernel(double* __restrict__ gram, int order, int column, double* __restrict__ v, double* __restrict__ t) {
  extern __shared__ __align__(16) double shared_memory[];
  PanelRows<Config> panel;
  panel.shared = reinterpret_cast<PanelShared<Config>*>(shared_memory);
  panel.matrix = gram + static_cast<int64_t>(blockIdx.y) * order * order;
  panel.order = order;
  panel.column = column;
  panel.rows = order - column - kWideBand;
  panel.stored_rows = static_cast<int>(padded_order(order)) - column - kWideBand;
  double* all_v = v + blockIdx.y * padded_order(order) * kWideBand;
  panel.v = all_v + (column + kWideBand) * kWideBand;
  panel.cluster = static_cast<int>(gridDim.x);
  panel.rank = panel.cluster == 1 ? 0 : cluster_rank();
  panel.warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  panel.at = {lane, lane / 4, lane % 4};

  for (int i = threadIdx.x; i < kWideBand * kWideBand; i += Config::warps * 32) {
    panel.shared->products[i / kWideBand][i % kWideBand] = 0;
    if (i < kWideBand) panel.shared->tau[i] = 0;
    const int first = column + kWideBand,
              above = first % kMatrixTile;  // rows of the first tile that are not the panel's
    if (panel.rank == 0 && above != 0) all_v[(first - above) * kWideBand + i] = 0;
  }
  if (threadIdx.x < 2) init_arrival(panel.shared->arrived[threadIdx.x]);
  // Every block of the cluster must have started before another one writes to its shared memory.
  if (panel.cluster > 1)
    cluster_sync();
  else
    __syncthreads();

  const int row = panel.warp_row() + panel.at.row_group * 4;
  double a[4][8];
  panel.load(a, row);
  panel.for_more([&](int more) {
    double b[4][8];
    panel.load(b, more);
    panel.store(b, more);
  });
  const int reflectors = panel.rows - 1 < kWideBand ? panel.rows - 1 : kWideBand;
  for (int jg = 0; jg * 8 < reflectors; ++jg) {
    panel.template step<0>(a, jg);
    if (jg * 8 + 1 < reflectors) panel.template step<1>(a, jg);
    if (jg * 8 + 2 < reflectors) panel.template step<2>(a, jg);
    if (jg * 8 + 3 < reflectors) panel.template step<3>(a, jg);
    if (jg * 8 + 4 < reflectors) panel.template step<4>(a, jg);
    if (jg * 8 + 5 < reflectors) panel.template step<5>(a, jg);
    if (jg * 8 + 6 < reflectors) panel.template step<6>(a, jg);
    if (jg * 8 + 7 < reflectors) panel.template step<7>(a, jg);
  }
  if (panel.warp_row() < panel.stored_rows) panel.finish(a, row, reflectors);
  panel.for_more([&](int more) {
    double b[4][8];
    panel.load_stored(b, more);
    panel.finish(b, more, reflectors);
  });
  if (panel.rank == 0 && panel.warp == 0) {
    __syncwarp();
    write_t(*panel.shared, lane, t + static_cast<int64_t>(blockIdx.y) * kWideBand * kWideBand);
  }
  // A block's shared memory must outlive the stores of the others.
  if (panel.cluster > 1) cluster_sync();
}

template <class Config>
void launch(double* gram, int batch, int order, int column, double* v, double* t, int max_blocks, cudaStream_t stream) {
  const int64_t rows = padded_order(order) - column - kWideBand;
  int blocks = 1;
  while (blocks < max_blocks && static_cast<int64_t>(blocks) * kRowsOfBlock<Config> < rows) blocks *= 2;
  const unsigned cluster = static_cast<unsigned>(blocks);
  const auto kernel = panel_qr_kernel<Config>;
  const ClusterLaunch launch(kernel, dim3(cluster, static_cast<unsigned>(batch)), cluster, Config::warps * 32,
                             sizeof(PanelShared<Config>), stream);
  FARMS_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, gram, order, column, v, t));
}

}  // namespace

void panel_qr(double* gram, int batch, int order, int column, double* v, double* t, const CudaDevice& device,
              cudaStream_t stream) {
  const int64_t rows = padded_order(order) - column - kWideBand;
  if (device.cluster_blocks == 1) return panel_qr_in_blocks(gram, batch, order, column, v, t, stream);
  const int blocks = device.cluster_blocks;
  if (rows <= blocks * kRowsOfBlock<ShortPanel>)
    launch<ShortPanel>(gram, batch, order, column, v, t, blocks, stream);
  else if (rows <= blocks * kRowsOfBlock<TallPanel>)
    launch<TallPanel>(gram, batch, order, column, v, t, blocks, stream);
  else
    launch<EndlessPanel>(gram, batch, order, column, v, t, blocks, stream);
}

}  // namespace farms_fast
