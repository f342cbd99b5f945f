// A V of one panel's reflectors V, and W from it, on the tensor cores in float64: two launches for the whole batch.
//
// A block of four warps forms 64 rows x 32 columns of A V, a warp 32 x 16 of them. It goes along the 64 rows of A in
// slabs of 32 columns, two stages of shared memory deep, or more where matrices are few: the others are copied while
// one is multiplied, with a barrier before (the copies of all threads have come) and after the products (all threads
// have read). Blocks do not wait for each other: the one that finishes last of a matrix, by a counter, adds up what all
// of them left.
//
// Tiles sit at multiples of kMatrixTile of the whole matrix, whatever the panel, so that the tiles on the diagonal,
// which are kept whole, are always the same ones.
#include "csrc/cuda/eigvalsh/band_panel.cuh"

namespace farms_fast {
namespace {

constexpr int kTilePitch = kMatrixTile + 4;

struct Stage {
  double a[kMatrixTile * kPanelPitch];  // A's rows x columns, or its mirror image: columns x rows with kTilePitch
  double v[kWideBand * kPanelPitch];
};

// Four blocks share a multiprocessor: 128 registers a thread, 16 of them for the sums of a warp's 32 x 16, and 55 kB of
// shared memory a block. With few matrices there are not so many blocks, and what a block waits for is the way to
// memory of one slab after the other: it has more of them under way.
struct ManyBlocks {
  static constexpr int stages = 2, blocks_per_processor = 4;
};
struct FewBlocks {
  static constexpr int stages = 6, blocks_per_processor = 1;
};
struct FewBlocksInLess {
  static constexpr int stages = 3, blocks_per_processor = 1;
};
template <class Order, class Panel, class Depth>
struct ProductConfig {
  using Pair = Panel;
  static constexpr int doubles = Order::doubles, stages = Depth::stages;
  static constexpr int blocks_per_processor = Depth::blocks_per_processor;
  static constexpr int shared_bytes = stages * sizeof(Stage);
  static_assert(hopper::shared_memory_holds(blocks_per_processor, shared_bytes));
};

// W = (A V) T - V middle, two factors of each product: 1 + shares products.
template <class Panel>
constexpr int kFactors = 2 + 2 * Panel::shares;

// Columns [column0, column0 + kWideBand) of the rows of one tile: below the diagonal as they are, above it from the
// mirrored tile, whose rows are those columns. Doubles: of one copy.
template <int Doubles>
__device__ __forceinline__ void copy_slab(Stage& stage, const double* __restrict__ matrix, int order, int row0,
                                          int column0, const double* __restrict__ v) {
  constexpr int rounds = kMatrixTile * kWideBand / (kBandThreads * Doubles);
  const int thread = static_cast<int>(threadIdx.x);
  const bool mirrored = column0 / kMatrixTile > row0 / kMatrixTile;
  const int wide = (mirrored ? kMatrixTile : kWideBand) / Doubles;  // threads to a row
  const int r = thread / wide, c = thread % wide * Doubles;
  const int top = (mirrored ? column0 : row0) + r, left = (mirrored ? row0 : column0) + c;
  const int step = kBandThreads / wide;
  const int64_t stride = static_cast<int64_t>(step) * order;
  const double* from = matrix + static_cast<int64_t>(top) * order + left;
  double* to = stage.a + r * (mirrored ? kTilePitch : kPanelPitch) + c;
  const int to_stride = step * (mirrored ? kTilePitch : kPanelPitch);
  const int valid = left < order ? (order - top + step - 1) / step : 0;  // rounds that are inside of the matrix
#pragma unroll
  for (int i = 0; i < rounds; ++i, from += stride, to += to_stride)
    copy_async<Doubles>(to, i < valid ? from : matrix, i < valid);
  copy_rows<kWideBand>(stage.v, kPanelPitch, v + column0 * kWideBand);
}

// Each warp's 32 x 16 part of (kMatrixTile x kWideBand) += a slab x V.
template <bool Mirrored>
__device__ __forceinline__ void multiply_slab(const Stage& stage, const PanelWarp& at, double (&sum)[2][2][4]) {
  constexpr int row_step = Mirrored ? 1 : kPanelPitch, column_step = Mirrored ? kTilePitch : 1;
  const double* a = stage.a + (at.warp / 2 * 32 + at.group) * row_step + at.in_group * column_step;
  const double* b = stage.v + at.in_group * kPanelPitch + at.warp % 2 * 16 + at.group;
#pragma unroll
  for (int k = 0; k < kWideBand; k += 4) {
    double left[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) left[i][half] = a[(i * 16 + half * 8) * row_step + k * column_step];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const double right = b[k * kPanelPitch + j * 8];
#pragma unroll
      for (int i = 0; i < 2; ++i) mma_16x8x4(sum[i][j], left[i], right);
    }
  }
}

// out (kWideBand x kWideBand) = left^T right over `depth` rows, or left right; a warp forms 16 x 16 of it.
template <bool TransposeLeft>
__device__ __forceinline__ void multiply_small(const double* left, const double* right, int depth, const PanelWarp& at,
                                               double (&sum)[2][4]) {
  const int row = at.warp / 2 * 16 + at.group, column = at.warp % 2 * 16 + at.group;
  for (int k = at.in_group; k < depth; k += 4) {
    double a[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      a[half] = TransposeLeft ? left[k * kPanelPitch + row + half * 8] : left[(row + half * 8) * kPanelPitch + k];
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_16x8x4(sum[j], a, right[k * kPanelPitch + column + j * 8]);
  }
}

// f(row, column, value) for each element of a warp's 16 x 16 part.
template <typename F>
__device__ __forceinline__ void for_small(const PanelWarp& at, const double (&sum)[2][4], const F& f) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      f(at.warp / 2 * 16 + e / 2 * 8 + at.group, at.warp % 2 * 16 + j * 8 + at.in_group * 2 + e % 2, sum[j][e]);
}

// grid: (tiles of rows, matrices). gram: (batch, order, order); the workspace's shapes are in two_stage.h. Writes A V,
// its shares of the small products, and in the block that finishes last of a matrix, `middle`.
template <class Config>
__global__ void __launch_bounds__(kBandThreads, Config::blocks_per_processor)
    multiply_kernel(const double* __restrict__ gram, int order, int begin, BandWorkspace workspace) {
  using Panel = typename Config::Pair;
  extern __shared__ __align__(16) double shared_memory[];
  Stage* stages = reinterpret_cast<Stage*>(shared_memory);
  const int64_t padded = padded_order(order);
  const int tiles = static_cast<int>(padded / kMatrixTile);
  const int tile = begin / kMatrixTile + static_cast<int>(blockIdx.x);
  const int row0 = tile * kMatrixTile;
  const double* matrix = gram + static_cast<int64_t>(blockIdx.y) * order * order;
  const double* v = workspace.v[Panel::second] + blockIdx.y * padded * kWideBand;
  const PanelWarp at = this_warp();

  // A tile below the diagonal is read for its rows and, mirrored, for its columns. The blocks of a matrix go through it
  // so that both happen at the same time, the second time out of the L2.
  const int first = begin / kMatrixTile, count = static_cast<int>(gridDim.x), own = static_cast<int>(blockIdx.x);
  const auto slab_column = [&](int slab) {
    const int shifted = slab / 2 - own;
    return (first + (shifted < 0 ? shifted + count : shifted)) * kMatrixTile + slab % 2 * kWideBand;
  };
  double sum[2][2][4] = {};
  // One group of copies a slab, empty past the last one.
  const auto copy = [&](int slab) {
    if (slab < 2 * count)
      copy_slab<Config::doubles>(stages[slab % Config::stages], matrix, order, row0, slab_column(slab), v);
    copy_commit();
  };
  for (int slab = 0; slab < Config::stages - 1; ++slab) copy(slab);
  for (int slab = 0; slab < 2 * count; ++slab) {
    copy(slab + Config::stages - 1);
    copy_wait<Config::stages - 1>();
    __syncthreads();
    const Stage& stage = stages[slab % Config::stages];
    if (slab_column(slab) / kMatrixTile > tile)
      multiply_slab<true>(stage, at, sum);
    else
      multiply_slab<false>(stage, at, sum);
    __syncthreads();
  }

  // The tile of A V to memory, and its share of V^T A V.
  double* own_product = shared_memory;                            // [kMatrixTile][kPanelPitch]
  double* own_v = shared_memory + kMatrixTile * kPanelPitch;      // [kMatrixTile][kPanelPitch]
  double* other = shared_memory + 2 * kMatrixTile * kPanelPitch;  // [kMatrixTile][kPanelPitch]
  const int64_t rows = (blockIdx.y * padded + row0) * kWideBand;
  copy_rows<kMatrixTile>(own_v, kPanelPitch, v + row0 * kWideBand);
  if constexpr (Panel::second) copy_rows<kMatrixTile>(other, kPanelPitch, workspace.v[0] + rows);
  copy_commit();
  double* product = workspace.product + rows;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = at.warp / 2 * 32 + i * 16 + e / 2 * 8 + at.group;
        const int c = at.warp % 2 * 16 + j * 8 + at.in_group * 2 + e % 2;
        own_product[r * kPanelPitch + c] = sum[i][j][e];
        product[r * kWideBand + c] = sum[i][j][e];
      }
  copy_wait<0>();
  __syncthreads();
  constexpr int square = kWideBand * kWideBand;
  double* partial = workspace.partial + blockIdx.y * tiles * static_cast<int64_t>(kMostShares * square);
  const auto store_share = [&](int which, const double* left) {
    double share[2][4] = {};
    multiply_small<true>(left, which == 0 ? own_product : own_v, kMatrixTile, at, share);
    for_small(at, share, [&](int r, int c, double value) {
      partial[(tile * kMostShares + which) * square + r * kWideBand + c] = value;
    });
  };
  store_share(0, own_v);
  if constexpr (Panel::second) {
    store_share(2, other);
    __syncthreads();
    copy_rows<kMatrixTile>(other, kPanelPitch, workspace.w[0] + rows);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    store_share(1, other);
  }

  // What this block left is in memory before it counts itself; who counts last sees what the others left before.
  __threadfence();
  __syncthreads();
  unsigned* last = reinterpret_cast<unsigned*>(shared_memory);
  if (threadIdx.x == 0) *last = atomicInc(workspace.done + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  const bool is_last = *last != 0;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  // The sums of the shares, in the order of the tiles: x of V^T A V, y and z of the others.
  double* x = shared_memory;  // each [kWideBand][kPanelPitch]
  double* y = x + kWideBand * kPanelPitch;
  double* z = y + kWideBand * kPanelPitch;
  double* t = z + kWideBand * kPanelPitch;
  double* right = t + kWideBand * kPanelPitch;
  // All of a thread's elements at a time, so that many loads are under way.
  constexpr int pairs = square / (2 * kBandThreads);
#pragma unroll 1
  for (int which = 0; which < Panel::shares; ++which) {
    double2 total[pairs] = {};
#pragma unroll 4
    for (int k = begin / kMatrixTile; k < tiles; ++k)
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        const double2 share = __ldcg(reinterpret_cast<const double2*>(partial + (k * kMostShares + which) * square) +
                                     i * kBandThreads + threadIdx.x);
        total[i].x += share.x;
        total[i].y += share.y;
      }
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int at = 2 * (i * kBandThreads + static_cast<int>(threadIdx.x));
      *reinterpret_cast<double2*>(x + which * kWideBand * kPanelPitch + at / kWideBand * kPanelPitch + at % kWideBand) =
          total[i];
    }
  }
  for (int i = threadIdx.x; i < square; i += kBandThreads)
    t[i / kWideBand * kPanelPitch + i % kWideBand] = workspace.t[blockIdx.y * square + i];
  __syncthreads();
  double* out = workspace.middle + blockIdx.y * static_cast<int64_t>(kMostShares * square);
  if constexpr (Panel::second) {
    // x was of the matrix as the panel before left it: less z^T y + y^T z now.
    double less[2][4] = {};
    multiply_small<true>(z, y, kWideBand, at, less);
    multiply_small<true>(y, z, kWideBand, at, less);
    for_small(at, less, [&](int r, int c, double value) { x[r * kPanelPitch + c] -= value; });
    double y_t[2][4] = {}, z_t[2][4] = {};
    multiply_small<false>(y, t, kWideBand, at, y_t);
    multiply_small<false>(z, t, kWideBand, at, z_t);
    for_small(at, y_t, [&](int r, int c, double value) { out[square + r * kWideBand + c] = value; });
    for_small(at, z_t, [&](int r, int c, double value) { out[2 * square + r * kWideBand + c] = value; });
    __syncthreads();
  }
  // T^T x T / 2.
  double inner[2][4] = {};
  multiply_small<false>(x, t, kWideBand, at, inner);
  for_small(at, inner, [&](int r, int c, double value) { right[r * kPanelPitch + c] = value; });
  __syncthreads();
  double middle[2][4] = {};
  multiply_small<true>(t, right, kWideBand, at, middle);
  for_small(at, middle, [&](int r, int c, double value) { out[r * kWideBand + c] = 0.5 * value; });
}

// grid: (half tiles of rows, matrices). W = (A V) T - V middle, zero above `begin`; with A V corrected for the first
// panel of the pair where this is the second.
template <class Panel>
__global__ void __launch_bounds__(kBandThreads) form_w_kernel(int order, int begin, BandWorkspace workspace) {
  extern __shared__ __align__(16) double shared_memory[];
  constexpr int block = kWideBand * kPanelPitch, square = kWideBand * kWideBand;
  const int64_t padded = padded_order(order);
  const int row0 = begin / kMatrixTile * kMatrixTile + static_cast<int>(blockIdx.x) * kWideBand;
  const int64_t rows = (blockIdx.y * padded + row0) * kWideBand;
  const double* middle = workspace.middle + blockIdx.y * static_cast<int64_t>(kMostShares * square);
  // Two factors of each product after the other.
  const double* factors[kFactors<Panel>];
  factors[0] = workspace.product + rows;
  factors[1] = workspace.t + static_cast<int64_t>(blockIdx.y) * square;
  factors[2] = workspace.v[Panel::second] + rows;
  factors[3] = middle;
  if constexpr (Panel::second) {
    factors[4] = workspace.v[0] + rows;
    factors[5] = middle + square;
    factors[6] = workspace.w[0] + rows;
    factors[7] = middle + 2 * square;
  }
#pragma unroll
  for (int i = 0; i < kFactors<Panel>; ++i) copy_rows<kWideBand>(shared_memory + i * block, kPanelPitch, factors[i]);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  const PanelWarp at = this_warp();
  double plus[2][4] = {}, minus[2][4] = {};
  multiply_small<false>(shared_memory, shared_memory + block, kWideBand, at, plus);
#pragma unroll
  for (int i = 0; i < Panel::shares; ++i)
    multiply_small<false>(shared_memory + (2 * i + 2) * block, shared_memory + (2 * i + 3) * block, kWideBand, at,
                          minus);
  double* w = workspace.w[Panel::second] + rows;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) plus[j][e] -= minus[j][e];
  for_small(at, plus, [&](int r, int c, double value) { w[r * kWideBand + c] = row0 + r < begin ? 0.0 : value; });
}

template <class Config>
void multiply(const double* gram, int batch, int order, int begin, int tiles, const BandWorkspace& workspace,
              cudaStream_t stream) {
  FARMS_CUDA_CHECK(
      cudaFuncSetAttribute(multiply_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::shared_bytes));
  multiply_kernel<Config>
      <<<dim3(tiles, batch), kBandThreads, Config::shared_bytes, stream>>>(gram, order, begin, workspace);
  FARMS_LAUNCH_CHECK();
}

template <class Order, class Panel>
void launch(const double* gram, int batch, int order, int begin, const BandWorkspace& workspace,
            const CudaDevice& device, cudaStream_t stream) {
  const int tiles = static_cast<int>(padded_order(order)) / kMatrixTile - begin / kMatrixTile;
  using Few = ProductConfig<Order, Panel, FewBlocks>;
  if (static_cast<int64_t>(tiles) * batch > device.processors)
    multiply<ProductConfig<Order, Panel, ManyBlocks>>(gram, batch, order, begin, tiles, workspace, stream);
  else if (Few::shared_bytes <= device.shared_bytes)
    multiply<Few>(gram, batch, order, begin, tiles, workspace, stream);
  else
    multiply<ProductConfig<Order, Panel, FewBlocksInLess>>(gram, batch, order, begin, tiles, workspace, stream);
  constexpr int form_bytes = kFactors<Panel> * kWideBand * kPanelPitch * sizeof(double);
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(form_w_kernel<Panel>, cudaFuncAttributeMaxDynamicSharedMemorySize, form_bytes));
  form_w_kernel<Panel><<<dim3(2 * tiles, batch), kBandThreads, form_bytes, stream>>>(order, begin, workspace);
  FARMS_LAUNCH_CHECK();
}

}  // namespace

void form_w(const double* gram, int batch, int order, int begin, const BandWorkspace& workspace,
            const CudaDevice& device, cudaStream_t stream) {
  dispatch_panel(order, begin, [&](auto alignment, auto panel) {
    launch<decltype(alignment), decltype(panel)>(gram, batch, order, begin, workspace, device, stream);
  });
}

}  // namespace farms_fast
