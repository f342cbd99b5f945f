// The two-sided update of the matrices by one panel's reflectors, on the tensor cores in float64. It is put off: of two
// panels that share a column of tiles, the first one's goes into that column alone, and what it leaves out goes in with
// the second one's, which so reads and writes the matrices half as often. Until then A V is corrected for it.
#include "csrc/cuda/eigvalsh/band_panel.cuh"
#include "csrc/cuda/triangle.cuh"

namespace farms_fast {
namespace {

// A block of four warps updates one 64 x 64 tile, a warp 32 x 32 of it, 64 doubles a thread. The factors pass through
// two stages of shared memory, one panel's V and W or W and V at a time. Three blocks share a multiprocessor: 168
// registers a thread and 72 kB of shared memory a block.
template <class Order, class Pair>
struct UpdateConfig {
  static constexpr int doubles = Order::doubles, panels = Pair::panels, blocks_per_processor = 3;
  static constexpr int stage_size = 2 * kMatrixTile * kPanelPitch;  // doubles: of the tile's rows, of its columns
  static constexpr int shared_bytes = 2 * stage_size * sizeof(double);
  static_assert(hopper::shared_memory_holds(blocks_per_processor, shared_bytes));
};

// grid: (tiles of the lower triangle, or of its first column, matrices). gram: (batch, order, order); the workspace's
// shapes are in two_stage.h. A -= [V W] [W V]^T, of both panels of a pair or of the first one. Blocks write tiles of
// their own and wait for nobody.
template <class Config>
__global__ void __launch_bounds__(kBandThreads, Config::blocks_per_processor)
    update_kernel(double* __restrict__ gram, int order, int begin, bool first_column, BandWorkspace workspace) {
  extern __shared__ __align__(16) double shared_memory[];
  constexpr int parts = 2 * Config::panels;
  const int64_t padded = padded_order(order);
  const int tile = static_cast<int>(blockIdx.x);
  int tile_row = triangle_row(tile);
  if (first_column) tile_row = tile;
  const int tile_column = first_column ? 0 : tile - tile_row * (tile_row + 1) / 2;
  const int row0 = (begin / kMatrixTile + tile_row) * kMatrixTile,
            column0 = (begin / kMatrixTile + tile_column) * kMatrixTile;
  // V of the tile's rows and W of its columns, then the other way around, then the next panel's.
  const auto copy_part = [&](int part) {
    double* stage = shared_memory + part % 2 * Config::stage_size;
    const double* left = part % 2 == 0 ? workspace.v[part / 2] : workspace.w[part / 2];
    const double* right = part % 2 == 0 ? workspace.w[part / 2] : workspace.v[part / 2];
    copy_rows<kMatrixTile>(stage, kPanelPitch, left + (blockIdx.y * padded + row0) * kWideBand);
    copy_rows<kMatrixTile>(stage + kMatrixTile * kPanelPitch, kPanelPitch,
                           right + (blockIdx.y * padded + column0) * kWideBand);
    copy_commit();
  };
  copy_part(0);
  copy_part(1);

  const PanelWarp at = this_warp();
  double* matrix = gram + static_cast<int64_t>(blockIdx.y) * order * order;
  const int warp_row = at.warp / 2 * 32, warp_column = at.warp % 2 * 32;
  const int r0 = row0 + warp_row + at.group, c0 = column0 + warp_column + at.in_group * 2;
  double sum[2][4][4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = r0 + i * 16 + half * 8;
      const double* from = matrix + static_cast<int64_t>(r) * order + c0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        double* pair = &sum[i][j][half * 2];
        const bool valid = r < order && c0 + j * 8 < order;
        if constexpr (Config::doubles == 2) {
          const double2 both = valid ? *reinterpret_cast<const double2*>(from + j * 8) : make_double2(0.0, 0.0);
          pair[0] = both.x;
          pair[1] = both.y;
        } else {
          pair[0] = valid ? from[j * 8] : 0.0;
          pair[1] = valid && c0 + j * 8 + 1 < order ? from[j * 8 + 1] : 0.0;
        }
      }
    }
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    if (part + 1 < parts)
      copy_wait<1>();
    else
      copy_wait<0>();
    __syncthreads();
    const double* stage = shared_memory + part % 2 * Config::stage_size;
    const double* a = stage + (warp_row + at.group) * kPanelPitch + at.in_group;
    const double* b = stage + kMatrixTile * kPanelPitch + (warp_column + at.group) * kPanelPitch + at.in_group;
#pragma unroll 4
    for (int k = 0; k < kWideBand; k += 4) {
      double l[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) l[i][half] = -a[(i * 16 + half * 8) * kPanelPitch + k];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const double right_value = b[j * 8 * kPanelPitch + k];
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_16x8x4(sum[i][j], l[i], right_value);
      }
    }
    if (part + 2 < parts) {
      __syncthreads();
      copy_part(part + 2);
    }
  }
  const bool diagonal = tile_row == tile_column;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = r0 + i * 16 + half * 8;
      double* to = matrix + static_cast<int64_t>(r) * order + c0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const double* pair = &sum[i][j][half * 2];
        if (Config::doubles == 2 && !diagonal) {
          if (r < order && c0 + j * 8 < order) *reinterpret_cast<double2*>(to + j * 8) = make_double2(pair[0], pair[1]);
          continue;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = c0 + j * 8 + e;
          if (r < order && c < order && (!diagonal || r >= c)) {
            to[j * 8 + e] = pair[e];
            if (diagonal && r != c) matrix[static_cast<int64_t>(c) * order + r] = pair[e];
          }
        }
      }
    }
}

template <class Order, class Panel>
void launch(double* gram, int batch, int order, int begin, const BandWorkspace& workspace, cudaStream_t stream) {
  using Config = UpdateConfig<Order, Panel>;
  const bool first_column = !Panel::second && has_panel(order, begin);
  const int tiles = static_cast<int>(padded_order(order)) / kMatrixTile - begin / kMatrixTile;
  const int count = first_column ? tiles : tiles * (tiles + 1) / 2;
  FARMS_CUDA_CHECK(
      cudaFuncSetAttribute(update_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::shared_bytes));
  update_kernel<Config>
      <<<dim3(count, batch), kBandThreads, Config::shared_bytes, stream>>>(gram, order, begin, first_column, workspace);
  FARMS_LAUNCH_CHECK();
}

}  // namespace

void apply_panel(double* gram, int batch, int order, int begin, const BandWorkspace& workspace,
                 const CudaDevice& device, cudaStream_t stream) {
  form_w(gram, batch, order, begin, workspace, device, stream);
  dispatch_panel(order, begin, [&](auto alignment, auto panel) {
    launch<decltype(alignment), decltype(panel)>(gram, batch, order, begin, workspace, stream);
  });
}

}  // namespace farms_fast
