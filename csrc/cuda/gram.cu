// Gram matrices of windows one by one. A block forms one tile of one window's Gram matrix, of the lower triangle only;
// the mirrored tile is written with it.
#include "csrc/cuda/check.h"
#include "csrc/cuda/gram_tile.cuh"
#include "csrc/cuda/triangle.cuh"
#include "csrc/gram.h"

namespace farms_fast {
namespace {

using namespace gram_tile;

// Products of `inner` elements, a piece of them at a time, whose sums are added up with their errors (Knuth's two-sum).
template <typename Product>
__device__ __forceinline__ void add_in_pieces(const Product& product, int64_t inner, int64_t piece,
                                              double* shared_memory, typename Product::Sums& sum) {
  typename Product::Sums error = {};
  for (int64_t begin = 0; begin < inner; begin += piece) {
    typename Product::Sums part = {};
    product.add(begin, begin + piece < inner ? begin + piece : inner, shared_memory, part);
#pragma unroll
    for (int p = 0; p < Product::planes; ++p)
#pragma unroll
      for (int i = 0; i < kRowParts; ++i)
#pragma unroll
        for (int j = 0; j < kColumnParts; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const double before = sum[p][i][j][e], added = part[p][i][j][e];
            const double after = before + added, shadow = after - before;
            error[p][i][j][e] += (before - (after - shadow)) + (added - shadow);
            sum[p][i][j][e] = after;
          }
  }
#pragma unroll
  for (int p = 0; p < Product::planes; ++p)
#pragma unroll
    for (int i = 0; i < kRowParts; ++i)
#pragma unroll
      for (int j = 0; j < kColumnParts; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[p][i][j][e] += error[p][i][j][e];
}

// grid: (tiles of the lower triangle, windows of this launch). windows: (count,), each of `order` vectors. gram:
// (count, order, order), both triangles written. Blocks write tiles of their own and wait for nobody. Long windows are
// summed up in pieces; some of a thread's sums are then in local memory, which is touched once a piece.
template <typename In, typename Kind, bool Long>
__global__ void __launch_bounds__(kGramThreads, Long ? 1 : Kind::blocks_per_processor)
    window_gram_kernel(const WindowView* __restrict__ windows, int64_t order, bool to_float32,
                       void* __restrict__ gram) {
  using Product = TileProduct<In, Kind>;
  extern __shared__ __align__(16) double shared_memory[];

  const int64_t tile = blockIdx.x;
  const int64_t tile_row = triangle_row(tile);
  const int64_t tile_column = tile - tile_row * (tile_row + 1) / 2;
  const int64_t row0 = tile_row * kGramTile, column0 = tile_column * kGramTile;

  const WindowView window = windows[blockIdx.y];
  const Product product(window.data, window.vector_stride, window.element_stride, order, row0, column0);
  typename Product::Sums sum = {};
  if constexpr (Long)
    add_in_pieces(product, window.inner, summed_depth(order), shared_memory, sum);
  else
    product.add(0, window.inner, shared_memory, sum);

  const int64_t matrix = static_cast<int64_t>(blockIdx.y) * order * order;
  Product::for_each(sum, [&](int, int row, int column, double re, double im) {
    const int64_t r = row0 + row, c = column0 + column;
    // In a diagonal tile the element below the diagonal writes its mirror image too, so that the two are equal.
    if (r >= order || c >= order || r < c) return;
    if (Kind::planes == 1 || r == c) im = 0.0;
    write<Kind>(gram, to_float32, matrix + r * order + c, re, im);
    if (r != c) write<Kind>(gram, to_float32, matrix + c * order + r, re, -im);
  });
}

template <typename In, typename Kind, bool Long>
void launch(const WindowView* windows, int64_t count, int64_t order, bool to_float32, void* gram, cudaStream_t stream) {
  const int64_t tiles = (order + kGramTile - 1) / kGramTile;
  const auto kernel = window_gram_kernel<In, Kind, Long>;
  constexpr int shared_bytes = TileProduct<In, Kind>::shared_bytes;
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int64_t matrix_bytes = order * order * (to_float32 ? 4 : 8) * Kind::planes;
  constexpr int64_t most = 65535;  // of a grid's second dimension
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t part = count - begin < most ? count - begin : most;
    const dim3 grid(static_cast<unsigned>(tiles * (tiles + 1) / 2), static_cast<unsigned>(part));
    kernel<<<grid, kGramThreads, shared_bytes, stream>>>(windows + begin, order, to_float32,
                                                         static_cast<char*>(gram) + begin * matrix_bytes);
    FARMS_LAUNCH_CHECK();
  }
}

}  // namespace

void window_gram_cuda(const WindowView* windows, int64_t count, int64_t order, int64_t longest, DType in,
                      DType precision, void* gram, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const bool to_float32 = precision == DType::f32;
  // Rounding to float32 is far above the error of any sum in float64.
  const bool in_pieces = longest > summed_depth(order) && !to_float32;
  dispatch_weight(in, [&](auto element, auto kind) {
    using In = decltype(element);
    using Kind = decltype(kind);
    const auto run = in_pieces ? launch<In, Kind, true> : launch<In, Kind, false>;
    run(windows, count, order, to_float32, gram, stream);
  });
}

}  // namespace farms_fast
