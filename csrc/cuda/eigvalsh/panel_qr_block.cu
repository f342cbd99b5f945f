// Householder QR of one panel of every matrix without clusters, a block a matrix.
//
// The block takes the panel's 32 columns by eights, left to right. A thread holds four rows of the eight in registers,
// rows `threads` apart; what is longer passes through the registers at every column, from v's memory and back.
//
//   1. All columns done so far, V, times the next eight, C: V^T C on the tensor cores, and with it what T lacks of V's
//      last eight. Rows are spread over the warps, whose sums meet in shared memory.
//   2. C -= V T^T (V^T C), by rows, in the registers.
//   3. Reflectors of the eight, one after the other. One reduction per column gives its norm, its products with the
//      columns to the right, and those with the reflectors to the left, which make T.
//
// The only waits are __syncthreads(), which all threads of a block reach: what they branch on around one (the columns,
// the rows) is the same in all of them. Blocks do not know of each other.
#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"
#include "csrc/cuda/hopper.h"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/warp.cuh"

namespace farms_fast {
namespace {

constexpr int kEight = 8;  // columns that are factored together
constexpr int kRowsOfThread = 4;
constexpr int kTileElements = 16 * 8;  // of a warp's product on the tensor cores

// 128 registers a thread, of which 64 are for its elements: as many blocks share a multiprocessor as that allows.
struct Panel512 {
  static constexpr int warps = 4, blocks_per_processor = 4;
};
struct Panel1024 {
  static constexpr int warps = 8, blocks_per_processor = 2;
};
struct Panel2048 {
  static constexpr int warps = 16, blocks_per_processor = 1;
};

template <class Config>
struct BlockPanelShared {
  static constexpr int most_tiles = 3;
  double partial[Config::warps][most_tiles][kTileElements];
  double left[kWideBand - kEight][kEight];    // V^T C
  double before[kWideBand - kEight][kEight];  // V^T (V's last eight), above those themselves
  double factor[kWideBand - kEight][kEight];  // T^T V^T C; and half-way to T's part above the last eight
  double t[kWideBand][kWideBand];
  double products[kEight][kEight];  // [l][j] = v_l . v_j for l < j, of the last eight
  double tau[kEight];
  // Double buffered: a column's are read while the next one's are written. The pitch keeps the sums of one column that
  // a warp reads at once on different banks.
  double warp_sums[2][kEight][Config::warps + 4];
  double pivot[2][kEight];

  static_assert(2 * kRowsOfThread * kEight + 64 <=
                    hopper::registers_per_thread(Config::warps, Config::blocks_per_processor),
                "a thread's elements, and as much to work with");
};

__device__ __forceinline__ void read_eight(double (&out)[kEight], const double* from) {
#pragma unroll
  for (int q = 0; q < kEight; q += 2) {
    const double2 pair = *reinterpret_cast<const double2*>(from + q);
    out[q] = pair.x;
    out[q + 1] = pair.y;
  }
}
__device__ __forceinline__ void write_eight(const double (&in)[kEight], double* to) {
#pragma unroll
  for (int q = 0; q < kEight; q += 2) *reinterpret_cast<double2*>(to + q) = make_double2(in[q], in[q + 1]);
}

// What a thread knows of its panel. Rows count from the panel's first.
template <class Config>
struct BlockPanel {
  static constexpr int threads = 32 * Config::warps, held_rows = kRowsOfThread * threads;

  double* panel;  // of the matrix, its first row and column
  double* v;      // of its first row
  int order, rows, stored_rows, reflectors;
  int thread, warp, lane;
  BlockPanelShared<Config>& shared;

  __device__ __forceinline__ int row_of(int i) const { return i * threads + thread; }

  // Calls f with the thread's rows beyond those that it holds.
  template <typename F>
  __device__ __forceinline__ void for_more(const F& f) const {
    for (int row = held_rows + thread; row < stored_rows; row += threads) f(row);
  }

  __device__ __forceinline__ void load(double (&a)[kEight], int row, int first) const {
#pragma unroll
    for (int q = 0; q < kEight; ++q) a[q] = 0;
    if (row >= rows) return;
    const double* from = panel + static_cast<int64_t>(row) * order + first;
    if (order % 2 == 0) {
      read_eight(a, from);
    } else {
#pragma unroll
      for (int q = 0; q < kEight; ++q) a[q] = from[q];
    }
  }

  // sums of V's columns from 0 on, 16 of them a tile, with eight others: of the matrix where Columns, else V's `eight`.
  // A lane's element of a row quadruple is row t, column g of whatever it is.
  template <int Done, bool Columns>
  __device__ __forceinline__ void multiply_done() {
    constexpr int v_tiles = (Done + 1) / 2, c_tiles = Columns ? v_tiles : 0;
    // T has what it needs of V's columns before the last eight.
    constexpr int last = Columns ? Done - 1 : Done, t_tiles = (last + 1) / 2;
    const int g = lane / 4, t = lane % 4;
    double with_c[c_tiles > 0 ? c_tiles : 1][4] = {}, with_v[t_tiles > 0 ? t_tiles : 1][4] = {};
#pragma unroll 4
    for (int row = 4 * warp + t; row < stored_rows; row += 4 * Config::warps) {
      double a[2 * v_tiles + 2];
#pragma unroll
      for (int i = 0; i < 2 * v_tiles + 2; ++i)
        a[i] = i <= last || i < Done ? v[row * kWideBand + i * kEight + g] : 0.0;
      if constexpr (Columns) {
        const double c = row < rows ? panel[static_cast<int64_t>(row) * order + Done * kEight + g] : 0.0;
#pragma unroll
        for (int i = 0; i < c_tiles; ++i) {
          const double pair[2] = {a[2 * i], 2 * i + 1 < Done ? a[2 * i + 1] : 0.0};
          mma_16x8x4(with_c[i], pair, c);
        }
      }
#pragma unroll
      for (int i = 0; i < t_tiles; ++i) {
        const double pair[2] = {a[2 * i], 2 * i + 1 < last ? a[2 * i + 1] : 0.0};
        mma_16x8x4(with_v[i], pair, a[last]);
      }
    }
    const auto keep = [&](const double (&sum)[4], int tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) shared.partial[warp][tile][(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sum[e];
    };
#pragma unroll
    for (int i = 0; i < c_tiles; ++i) keep(with_c[i], i);
#pragma unroll
    for (int i = 0; i < t_tiles; ++i) keep(with_v[i], c_tiles + i);
    __syncthreads();
    constexpr int elements = (c_tiles + t_tiles) * kTileElements;
    for (int i = thread; i < elements; i += threads) {
      double total = 0;
#pragma unroll
      for (int w = 0; w < Config::warps; ++w) total += shared.partial[w][i / kTileElements][i % kTileElements];
      const bool of_c = i < c_tiles * kTileElements;
      const int at = of_c ? i : i - c_tiles * kTileElements, row = at / kEight;
      if (of_c ? row < Done * kEight : row < last * kEight)
        (of_c ? shared.left : shared.before)[row][at % kEight] = total;
    }
    __syncthreads();
  }

  // T's part above the eight columns from `first` on: -T before T_first, of what lies there already. Below its diagonal
  // T is zero, so that sums may run over whole eights.
  __device__ __forceinline__ void extend_t(int first) {
    for (int i = thread; i < first * kEight; i += threads) {
      const int row = i / kEight, column = i % kEight;
      double sum = 0;
#pragma unroll
      for (int l = 0; l < kEight; ++l) sum += shared.before[row][l] * shared.t[first + l][first + column];
      shared.factor[row][column] = sum;
    }
    __syncthreads();
    for (int i = thread; i < first * kEight; i += threads) {
      const int row = i / kEight, column = i % kEight;
      double sum = 0;
#pragma unroll 8
      for (int l = row / kEight * kEight; l < first; ++l) sum += shared.t[row][l] * shared.factor[l][column];
      shared.t[row][first + column] = -sum;
    }
    __syncthreads();
  }

  // T of the last eight by themselves: t_j = -tau_j (t . (V^T v_j)), a lane a row.
  __device__ __forceinline__ void begin_t(int first) {
    if (thread < kEight) {
      double row[kEight];
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        double sum = 0;
#pragma unroll
        for (int l = 0; l < j; ++l) sum += row[l] * shared.products[l][j];
        row[j] = j > thread ? -shared.tau[j] * sum : (j == thread ? shared.tau[j] : 0.0);
        shared.t[first + thread][first + j] = row[j];
      }
    }
    __syncthreads();
  }

  // T^T times V^T C, of the first `done` columns.
  __device__ __forceinline__ void form_factor(int done) {
    for (int i = thread; i < done * kEight; i += threads) {
      const int row = i / kEight, column = i % kEight;
      double sum = 0;
#pragma unroll 8
      for (int l = 0; l < (row / kEight + 1) * kEight; ++l) sum += shared.t[l][row] * shared.left[l][column];
      shared.factor[row][column] = sum;
    }
    __syncthreads();
  }

  // a -= V factor, V's first `done` columns, in these rows.
  template <int Rows>
  __device__ __forceinline__ void subtract(double (&a)[Rows][kEight], const int (&row)[Rows], int done) const {
#pragma unroll 2
    for (int p = 0; p < done; p += 2) {
      double2 pair[Rows];
#pragma unroll
      for (int i = 0; i < Rows; ++i)
        pair[i] = row[i] < stored_rows ? *reinterpret_cast<const double2*>(v + row[i] * kWideBand + p)
                                       : make_double2(0.0, 0.0);
#pragma unroll
      for (int q = 0; q < kEight; q += 2) {
        const double2 first = *reinterpret_cast<const double2*>(&shared.factor[p][q]),
                      second = *reinterpret_cast<const double2*>(&shared.factor[p + 1][q]);
#pragma unroll
        for (int i = 0; i < Rows; ++i) {
          a[i][q] -= pair[i].x * first.x + pair[i].y * second.x;
          a[i][q + 1] -= pair[i].x * first.y + pair[i].y * second.y;
        }
      }
    }
  }

  template <int jj>
  __device__ __forceinline__ void step(double (&a)[kRowsOfThread][kEight], int first) {
    const int j = first + jj, parity = jj & 1;
    double x[kRowsOfThread], sums[kEight] = {};
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      x[i] = i > 0 || thread >= j ? a[i][jj] : 0.0;
#pragma unroll
      for (int q = 0; q < kEight; ++q) sums[q] += x[i] * a[i][q];
    }
    for_more([&](int row) {
      double b[kEight];
      read_eight(b, v + row * kWideBand + first);
#pragma unroll
      for (int q = 0; q < kEight; ++q) sums[q] += b[jj] * b[q];
    });
    // Each exchange halves the columns too, so that a lane ends with column lane / 4.
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = (lane & 4 * half) != 0;
#pragma unroll
      for (int q = 0; q < half; ++q) {
        const double keep = upper ? sums[q + half] : sums[q], give = upper ? sums[q] : sums[q + half];
        sums[q] = keep + __shfl_xor_sync(kAllLanes, give, 4 * half);
      }
    }
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 2);
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 1);
    if (lane % 4 == 0) shared.warp_sums[parity][lane / 4][warp] = sums[0];
    if (thread == j)
#pragma unroll
      for (int q = 0; q < kEight; ++q) shared.pivot[parity][q] = a[0][q];
    __syncthreads();

    // Every warp adds them up for itself.
    const int own = lane / 4;
    double sum = 0;
#pragma unroll
    for (int w = 0; w < Config::warps; w += 4) sum += shared.warp_sums[parity][own][w + lane % 4];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const double pivot = shared.pivot[parity][own];
    const double norm2 = __shfl_sync(kAllLanes, sum, 4 * jj), alpha = __shfl_sync(kAllLanes, pivot, 4 * jj);
    const Reflector h = make_reflector(alpha, norm2);
    const double product = h.scale * (sum - h.beta * pivot);
    if (warp == 0 && lane % 4 == 0) {
      if (own < jj) shared.products[own][jj] = product;
      if (own == jj) shared.tau[jj] = h.tau;
    }
    const double own_coefficient = own > jj ? h.tau * product : 0.0;
    double coefficient[kEight];
#pragma unroll
    for (int q = jj + 1; q < kEight; ++q) coefficient[q] = __shfl_sync(kAllLanes, own_coefficient, 4 * q);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const bool above = i == 0 && thread < j, at = i == 0 && thread == j;
      const double own_v = above ? 0.0 : (at ? 1.0 : x[i] * h.scale);
#pragma unroll
      for (int q = jj + 1; q < kEight; ++q) a[i][q] -= own_v * coefficient[q];
      if (!above) a[i][jj] = at ? h.beta : own_v;
    }
    for_more([&](int row) {
      double b[kEight];
      read_eight(b, v + row * kWideBand + first);
      b[jj] *= h.scale;
#pragma unroll
      for (int q = jj + 1; q < kEight; ++q) b[q] -= b[jj] * coefficient[q];
      write_eight(b, v + row * kWideBand + first);
    });
  }

  // The vectors with their ones and zeros, the triangle into the matrix.
  __device__ __forceinline__ void finish(const double (&a)[kEight], int row, int first) const {
    if (row >= stored_rows) return;
    double out[kEight];
#pragma unroll
    for (int q = 0; q < kEight; ++q) {
      const int l = first + q;
      out[q] = row > l ? a[q] : (row == l && l < reflectors ? 1.0 : 0.0);
      if (row <= l && row < rows) panel[static_cast<int64_t>(row) * order + l] = a[q];
    }
    write_eight(out, v + row * kWideBand + first);
  }

  // The columns from `first` on.
  __device__ __forceinline__ void eight_columns(int first) {
    if (first == kEight) multiply_done<1, true>();
    if (first == 2 * kEight) multiply_done<2, true>();
    if (first == 3 * kEight) multiply_done<3, true>();
    if (first > kEight) extend_t(first - kEight);
    if (first > 0) form_factor(first);
    double a[kRowsOfThread][kEight];
    {
      int row[kRowsOfThread];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        row[i] = row_of(i);
        load(a[i], row[i], first);
      }
      subtract(a, row, first);
    }
    for_more([&](int more) {
      double b[1][kEight];
      const int of_b[1] = {more};
      load(b[0], more, first);
      subtract(b, of_b, first);
      write_eight(b[0], v + more * kWideBand + first);
    });
    if (thread < kEight * kEight) {
      shared.products[thread / kEight][thread % kEight] = 0;
      if (thread < kEight) shared.tau[thread] = 0;
    }
    __syncthreads();
    step_if<0>(a, first);
    step_if<1>(a, first);
    step_if<2>(a, first);
    step_if<3>(a, first);
    step_if<4>(a, first);
    step_if<5>(a, first);
    step_if<6>(a, first);
    step_if<7>(a, first);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) finish(a[i], row_of(i), first);
    for_more([&](int more) {
      double b[kEight];
      read_eight(b, v + more * kWideBand + first);
      finish(b, more, first);
    });
    __syncthreads();  // V's eight columns, their products and scales are there
    begin_t(first);
  }
  template <int jj>
  __device__ __forceinline__ void step_if(double (&a)[kRowsOfThread][kEight], int first) {
    if (first + jj < reflectors) step<jj>(a, first);
  }
};

// grid: (matrices). Shapes as in two_stage.h. Dynamic shared memory: a BlockPanelShared.
template <class Config>
__global__ void __launch_bounds__(32 * Config::warps, Config::blocks_per_processor)
    block_panel_kernel(double* __restrict__ gram, int order, int column, double* v, double* __restrict__ t) {
  extern __shared__ __align__(16) double shared_memory[];
  using Panel = BlockPanel<Config>;
  auto& shared = *reinterpret_cast<BlockPanelShared<Config>*>(shared_memory);
  const int first = column + kWideBand, padded = static_cast<int>(padded_order(order)), rows = order - first;
  double* all_v = v + blockIdx.x * static_cast<int64_t>(padded) * kWideBand;
  const int thread = static_cast<int>(threadIdx.x);
  Panel panel{gram + static_cast<int64_t>(blockIdx.x) * order * order + static_cast<int64_t>(first) * order + column,
              all_v + first * kWideBand,
              order,
              rows,
              padded - first,
              rows - 1 < kWideBand ? rows - 1 : kWideBand,
              thread,
              thread / 32,
              thread % 32,
              shared};
  // Rows of the first tile that are not the panel's.
  for (int i = thread; i < first % kMatrixTile * kWideBand; i += Panel::threads)
    all_v[first / kMatrixTile * kMatrixTile * kWideBand + i] = 0;
  for (int i = thread; i < kWideBand * kWideBand; i += Panel::threads) shared.t[i / kWideBand][i % kWideBand] = 0;
#pragma unroll 1
  for (int eight = 0; eight < kWideBand; eight += kEight) panel.eight_columns(eight);
  panel.template multiply_done<3, false>();
  panel.extend_t(kWideBand - kEight);
  double* out = t + blockIdx.x * static_cast<int64_t>(kWideBand * kWideBand);
  for (int i = thread; i < kWideBand * kWideBand; i += Panel::threads) out[i] = shared.t[i / kWideBand][i % kWideBand];
}

template <class Config>
void launch(double* gram, int batch, int order, int column, double* v, double* t, cudaStream_t stream) {
  constexpr int bytes = sizeof(BlockPanelShared<Config>);
  static_assert(bytes <= cuda_device(86).shared_bytes &&
                hopper::shared_memory_holds(Config::blocks_per_processor, bytes));
  FARMS_CUDA_CHECK(
      cudaFuncSetAttribute(block_panel_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  block_panel_kernel<Config><<<batch, 32 * Config::warps, bytes, stream>>>(gram, order, column, v, t);
  FARMS_LAUNCH_CHECK();
}

}  // namespace

void panel_qr_in_blocks(double* gram, int batch, int order, int column, double* v, double* t, cudaStream_t stream) {
  const int64_t rows = padded_order(order) - column - kWideBand;
  if (rows <= BlockPanel<Panel512>::held_rows)
    launch<Panel512>(gram, batch, order, column, v, t, stream);
  else if (rows <= BlockPanel<Panel1024>::held_rows)
    launch<Panel1024>(gram, batch, order, column, v, t, stream);
  else
    launch<Panel2048>(gram, batch, order, column, v, t, stream);
}

}  // namespace farms_fast
