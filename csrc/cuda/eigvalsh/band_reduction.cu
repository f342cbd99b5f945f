// The two-sided update of the matrices by one panel's reflectors, on the tensor cores in float64: three launches a
// panel for the whole batch. Tiles sit at multiples of kTile of the whole matrix, whatever the panel, so that the tiles
// on the diagonal, which are kept whole, are always the same ones.
#include "../check.h"
#include "../mma.cuh"
#include "async_copy.cuh"
#include "two_stage.h"

namespace farms_fast {
namespace {

constexpr int kThreads = 128;            // four warps
constexpr int kPanel = kWideBand;        // columns of V, W and A V
constexpr int kPanelPitch = kPanel + 4;  // doubles per row in shared memory: a fragment's loads touch all banks once
constexpr int kTilePitch = kTile + 4;

struct Warp {
  int warp, group, in_group;  // group, in_group: of a fragment, see mma.cuh
};
__device__ __forceinline__ Warp this_warp() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return {static_cast<int>(threadIdx.x) / 32, lane / 4, lane % 4};
}

// rows x kPanel doubles of V, W or A V into shared memory.
template <int Rows>
__device__ __forceinline__ void copy_rows(double* shared, int pitch, const double* __restrict__ rows) {
#pragma unroll
  for (int i = 0; i < Rows * kPanel / 2 / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int r = index / (kPanel / 2), c = index % (kPanel / 2) * 2;
    copy_async<2>(shared + r * pitch + c, rows + r * kPanel + c);
  }
}

struct Stage {
  double a[kTile * kPanelPitch];  // A's rows x columns, or its mirror image: columns x rows with kTilePitch
  double v[kPanel * kPanelPitch];
};

// Columns [column0, column0 + kPanel) of the rows of one tile: below the diagonal as they are, above it from the
// mirrored place, whose rows are those columns. Width: doubles of one copy.
template <int Width>
__device__ __forceinline__ void copy_slab(Stage& stage, const double* __restrict__ matrix, int order, int row0,
                                          int column0, const double* __restrict__ v) {
  constexpr int rounds = kTile * kPanel / (kThreads * Width);
  const int thread = static_cast<int>(threadIdx.x);
  const bool mirrored = column0 / kTile > row0 / kTile;
  const int wide = (mirrored ? kTile : kPanel) / Width;  // threads to a row
  const int r = thread / wide, c = thread % wide * Width;
  const int top = (mirrored ? column0 : row0) + r, left = (mirrored ? row0 : column0) + c;
  const int step = kThreads / wide;
  const int64_t stride = static_cast<int64_t>(step) * order;
  const double* from = matrix + static_cast<int64_t>(top) * order + left;
  double* to = stage.a + r * (mirrored ? kTilePitch : kPanelPitch) + c;
  const int to_stride = step * (mirrored ? kTilePitch : kPanelPitch);
  const int valid = left < order ? (order - top + step - 1) / step : 0;  // rounds that are inside of the matrix
#pragma unroll
  for (int i = 0; i < rounds; ++i, from += stride, to += to_stride)
    copy_async<Width>(to, i < valid ? from : matrix, i < valid);
  copy_rows<kPanel>(stage.v, kPanelPitch, v + column0 * kPanel);
}

// Each warp's 32 x 16 part of (kTile x kPanel) += a slab x V.
template <bool Mirrored>
__device__ __forceinline__ void multiply_slab(const Stage& stage, const Warp& at, double (&sum)[2][2][4]) {
  constexpr int row_step = Mirrored ? 1 : kPanelPitch, column_step = Mirrored ? kTilePitch : 1;
  const double* a = stage.a + (at.warp / 2 * 32 + at.group) * row_step + at.in_group * column_step;
  const double* b = stage.v + at.in_group * kPanelPitch + at.warp % 2 * 16 + at.group;
#pragma unroll
  for (int k = 0; k < kPanel; k += 4) {
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

// out (kPanel x kPanel) = left^T right over `depth` rows, or left right; a warp forms 16 x 16 of it.
template <bool TransposeLeft>
__device__ __forceinline__ void multiply_small(const double* left, const double* right, int depth, const Warp& at,
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
__device__ __forceinline__ void for_small(const Warp& at, const double (&sum)[2][4], const F& f) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      f(at.warp / 2 * 16 + e / 2 * 8 + at.group, at.warp % 2 * 16 + j * 8 + at.in_group * 2 + e % 2, sum[j][e]);
}

// grid: (tiles of rows, matrices). A V, and in the block that finishes last of a matrix, `middle`.
template <int Width>
__global__ void __launch_bounds__(kThreads, 4)
    multiply_kernel(const double* __restrict__ gram, int order, int begin, BandWorkspace workspace) {
  extern __shared__ __align__(16) double shared_memory[];
  Stage* stages = reinterpret_cast<Stage*>(shared_memory);
  const int64_t padded = padded_order(order);
  const int tiles = static_cast<int>(padded / kTile);
  const int tile = begin / kTile + static_cast<int>(blockIdx.x);
  const int row0 = tile * kTile;
  const double* matrix = gram + static_cast<int64_t>(blockIdx.y) * order * order;
  const double* v = workspace.v + blockIdx.y * padded * kPanel;
  const Warp at = this_warp();

  double sum[2][2][4] = {};
  copy_slab<Width>(stages[0], matrix, order, row0, begin, v);
  copy_commit();
  int current = 0;
  for (int column0 = begin; column0 < order; column0 += kPanel, current ^= 1) {
    if (column0 + kPanel < order) copy_slab<Width>(stages[current ^ 1], matrix, order, row0, column0 + kPanel, v);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    if (column0 / kTile > tile)
      multiply_slab<true>(stages[current], at, sum);
    else
      multiply_slab<false>(stages[current], at, sum);
    __syncthreads();
  }

  // The tile of A V to memory, and its share of V^T A V.
  double* own_product = shared_memory;                  // [kTile][kPanelPitch]
  double* own_v = shared_memory + kTile * kPanelPitch;  // [kTile][kPanelPitch]
  copy_rows<kTile>(own_v, kPanelPitch, v + row0 * kPanel);
  copy_commit();
  double* product = workspace.product + (blockIdx.y * padded + row0) * kPanel;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = at.warp / 2 * 32 + i * 16 + e / 2 * 8 + at.group;
        const int c = at.warp % 2 * 16 + j * 8 + at.in_group * 2 + e % 2;
        own_product[r * kPanelPitch + c] = sum[i][j][e];
        product[r * kPanel + c] = sum[i][j][e];
      }
  copy_wait<0>();
  __syncthreads();
  double share[2][4] = {};
  multiply_small<true>(own_v, own_product, kTile, at, share);
  double* partial = workspace.partial + blockIdx.y * tiles * static_cast<int64_t>(kPanel * kPanel);
  for_small(at, share, [&](int r, int c, double value) { partial[(tile * kPanel + r) * kPanel + c] = value; });

  __threadfence();
  __syncthreads();
  unsigned* last = reinterpret_cast<unsigned*>(shared_memory);
  if (threadIdx.x == 0) *last = atomicInc(workspace.done + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  const bool is_last = *last != 0;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  // middle = T^T X T / 2 with X the sum of the shares, in the order of the tiles.
  double* x = shared_memory;                     // [kPanel][kPanelPitch]
  double* t = x + kPanel * kPanelPitch;          // [kPanel][kPanelPitch]
  double* right = x + 2 * kPanel * kPanelPitch;  // [kPanel][kPanelPitch]
  for (int i = threadIdx.x; i < kPanel * kPanel; i += kThreads) {
    double total = 0;
    for (int k = begin / kTile; k < tiles; ++k) total += __ldcg(partial + k * kPanel * kPanel + i);
    x[i / kPanel * kPanelPitch + i % kPanel] = total;
    t[i / kPanel * kPanelPitch + i % kPanel] = workspace.t[blockIdx.y * kPanel * kPanel + i];
  }
  __syncthreads();
  double inner[2][4] = {};
  multiply_small<false>(x, t, kPanel, at, inner);
  for_small(at, inner, [&](int r, int c, double value) { right[r * kPanelPitch + c] = value; });
  __syncthreads();
  double middle[2][4] = {};
  multiply_small<true>(t, right, kPanel, at, middle);
  double* out = workspace.middle + blockIdx.y * kPanel * kPanel;
  for_small(at, middle, [&](int r, int c, double value) { out[r * kPanel + c] = 0.5 * value; });
}

// grid: (half tiles of rows, matrices). W = (A V) T - V middle, zero above `begin`.
__global__ void __launch_bounds__(kThreads) form_w_kernel(int order, int begin, BandWorkspace workspace) {
  extern __shared__ __align__(16) double shared_memory[];
  const int64_t padded = padded_order(order);
  double* product = shared_memory;
  double* t = product + kPanel * kPanelPitch;
  double* v = t + kPanel * kPanelPitch;
  double* middle = v + kPanel * kPanelPitch;
  const int row0 = begin / kTile * kTile + static_cast<int>(blockIdx.x) * kPanel;
  const int64_t rows = (blockIdx.y * padded + row0) * kPanel, square = blockIdx.y * kPanel * kPanel;
  copy_rows<kPanel>(product, kPanelPitch, workspace.product + rows);
  copy_rows<kPanel>(t, kPanelPitch, workspace.t + square);
  copy_rows<kPanel>(v, kPanelPitch, workspace.v + rows);
  copy_rows<kPanel>(middle, kPanelPitch, workspace.middle + square);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  const Warp at = this_warp();
  double plus[2][4] = {}, minus[2][4] = {};
  multiply_small<false>(product, t, kPanel, at, plus);
  multiply_small<false>(v, middle, kPanel, at, minus);
  double* w = workspace.w + rows;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) plus[j][e] -= minus[j][e];
  for_small(at, plus, [&](int r, int c, double value) { w[r * kPanel + c] = row0 + r < begin ? 0.0 : value; });
}

// grid: (tiles of the lower triangle, matrices). A -= [V W] [W V]^T.
template <int Width>
__global__ void __launch_bounds__(kThreads, 3)
    update_kernel(double* __restrict__ gram, int order, int begin, BandWorkspace workspace) {
  extern __shared__ __align__(16) double shared_memory[];
  double* left = shared_memory;                        // [kTile][kTilePitch]: V, W of the tile's rows
  double* right = shared_memory + kTile * kTilePitch;  // [kTile][kTilePitch]: W, V of its columns
  const int64_t padded = padded_order(order);
  const int tile = static_cast<int>(blockIdx.x);
  int tile_row = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
  while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
  while (tile_row * (tile_row + 1) / 2 > tile) --tile_row;
  const int tile_column = tile - tile_row * (tile_row + 1) / 2;
  const int row0 = (begin / kTile + tile_row) * kTile, column0 = (begin / kTile + tile_column) * kTile;
  const double* v = workspace.v + blockIdx.y * padded * kPanel;
  const double* w = workspace.w + blockIdx.y * padded * kPanel;
  copy_rows<kTile>(left, kTilePitch, v + row0 * kPanel);
  copy_rows<kTile>(left + kPanel, kTilePitch, w + row0 * kPanel);
  copy_rows<kTile>(right, kTilePitch, w + column0 * kPanel);
  copy_rows<kTile>(right + kPanel, kTilePitch, v + column0 * kPanel);
  copy_commit();

  const Warp at = this_warp();
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
        if constexpr (Width == 2) {
          const double2 both = valid ? *reinterpret_cast<const double2*>(from + j * 8) : make_double2(0.0, 0.0);
          pair[0] = both.x;
          pair[1] = both.y;
        } else {
          pair[0] = valid ? from[j * 8] : 0.0;
          pair[1] = valid && c0 + j * 8 + 1 < order ? from[j * 8 + 1] : 0.0;
        }
      }
    }
  copy_wait<0>();
  __syncthreads();
  const double* a = left + (warp_row + at.group) * kTilePitch + at.in_group;
  const double* b = right + (warp_column + at.group) * kTilePitch + at.in_group;
#pragma unroll 4
  for (int k = 0; k < kTile; k += 4) {
    double l[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) l[i][half] = -a[(i * 16 + half * 8) * kTilePitch + k];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const double right_value = b[j * 8 * kTilePitch + k];
#pragma unroll
      for (int i = 0; i < 2; ++i) mma_16x8x4(sum[i][j], l[i], right_value);
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
        if (Width == 2 && !diagonal) {
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

// Width: doubles of one access to the matrices, 2 where all of their rows are aligned to it.
template <int Width>
void launch(double* gram, int batch, int order, int begin, const BandWorkspace& workspace, cudaStream_t stream) {
  const int first = begin / kTile, tiles = static_cast<int>(padded_order(order)) / kTile - first;
  const int pairs = tiles * (tiles + 1) / 2;
  constexpr int multiply_bytes = 2 * sizeof(Stage);
  constexpr int form_bytes = 4 * kPanel * kPanelPitch * sizeof(double);
  constexpr int update_bytes = 2 * kTile * kTilePitch * sizeof(double);
  FARMS_CUDA_CHECK(
      cudaFuncSetAttribute(multiply_kernel<Width>, cudaFuncAttributeMaxDynamicSharedMemorySize, multiply_bytes));
  FARMS_CUDA_CHECK(
      cudaFuncSetAttribute(update_kernel<Width>, cudaFuncAttributeMaxDynamicSharedMemorySize, update_bytes));
  multiply_kernel<Width><<<dim3(tiles, batch), kThreads, multiply_bytes, stream>>>(gram, order, begin, workspace);
  FARMS_LAUNCH_CHECK();
  form_w_kernel<<<dim3(2 * tiles, batch), kThreads, form_bytes, stream>>>(order, begin, workspace);
  FARMS_LAUNCH_CHECK();
  update_kernel<Width><<<dim3(pairs, batch), kThreads, update_bytes, stream>>>(gram, order, begin, workspace);
  FARMS_LAUNCH_CHECK();
}

}  // namespace

void apply_panel(double* gram, int batch, int order, int begin, const BandWorkspace& workspace, cudaStream_t stream) {
  if (order % 2 == 0)
    launch<2>(gram, batch, order, begin, workspace, stream);
  else
    launch<1>(gram, batch, order, begin, workspace, stream);
}

}  // namespace farms_fast
