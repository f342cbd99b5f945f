// Gram matrices of windows on the tensor cores in float64. A block forms one 64 x 64 tile of one window's Gram matrix,
// of the lower triangle only; the mirrored tile is written with it. Windows are read in place, whatever their strides
// and type, and converted on the way into shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../gram.h"
#include "check.h"
#include "mma.cuh"

namespace farms_fast {
namespace {

constexpr int kTile = 64;           // rows and columns of a block's tile
constexpr int kDepth = 16;          // elements of the vectors per step
constexpr int kPitch = kDepth + 4;  // doubles per row in shared memory: a warp's fragment loads then touch 32 banks
constexpr int kThreads = 128;       // four warps, 32 x 32 each
constexpr int kPerThread = kTile * kDepth / kThreads;

struct Real {
  static constexpr int planes = 1;
};
struct Complex {
  static constexpr int planes = 2;  // real and imaginary parts
};

// The real or imaginary part of a weight's element. Intrinsics for the half types: torch's build takes their operators
// away.
__device__ __forceinline__ double plane_of(__half value, int) { return __half2float(value); }
__device__ __forceinline__ double plane_of(__nv_bfloat16 value, int) { return __bfloat162float(value); }
__device__ __forceinline__ double plane_of(float value, int) { return value; }
__device__ __forceinline__ double plane_of(double value, int) { return value; }
__device__ __forceinline__ double plane_of(const float2& value, int plane) { return plane ? value.y : value.x; }
__device__ __forceinline__ double plane_of(const double2& value, int plane) { return plane ? value.y : value.x; }

// One thread's share of a kTile x kDepth slab of vectors: global memory to registers, then registers to shared memory,
// so that the next slab's loads are in flight while this one is multiplied.
template <typename In, int Planes>
struct Slab {
  In values[kPerThread];

  // `along_vectors`: neighbouring threads take neighbouring vectors (the smaller stride), else neighbouring elements.
  __device__ void load(const WindowView& window, int64_t order, int64_t first_vector, int64_t first_element,
                       bool along_vectors) {
    const In* data = static_cast<const In*>(window.data);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int index = i * kThreads + threadIdx.x;
      const int64_t v = first_vector + (along_vectors ? index % kTile : index / kDepth);
      const int64_t t = first_element + (along_vectors ? index / kTile : index % kDepth);
      values[i] = In{};  // zero bits are 0 in every type
      if (v < order && t < window.inner) values[i] = data[v * window.vector_stride + t * window.element_stride];
    }
  }

  __device__ void store(double (*shared)[kTile][kPitch], bool along_vectors) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int index = i * kThreads + threadIdx.x;
      const int v = along_vectors ? index % kTile : index / kDepth;
      const int t = along_vectors ? index / kTile : index % kDepth;
#pragma unroll
      for (int plane = 0; plane < Planes; ++plane) shared[plane][v][t] = plane_of(values[i], plane);
    }
  }
};

// Stores one element of the Gram matrix; `single` halves the precision on the way out.
template <typename Kind>
__device__ __forceinline__ void write(void* gram, bool single, int64_t at, double re, double im) {
  if constexpr (Kind::planes == 1) {
    if (single)
      static_cast<float*>(gram)[at] = static_cast<float>(re);
    else
      static_cast<double*>(gram)[at] = re;
  } else {
    if (single)
      static_cast<float2*>(gram)[at] = make_float2(static_cast<float>(re), static_cast<float>(im));
    else
      static_cast<double2*>(gram)[at] = make_double2(re, im);
  }
}

// grid: (tiles of the lower triangle, windows of this launch).
template <typename In, typename Kind>
__global__ void __launch_bounds__(kThreads)
    window_gram_kernel(const WindowView* __restrict__ windows, int64_t order, bool single, void* __restrict__ gram) {
  constexpr int planes = Kind::planes;
  extern __shared__ double shared_memory[];
  using Plane = double[kTile][kPitch];
  Plane* rows = reinterpret_cast<Plane*>(shared_memory);  // [planes]
  Plane* columns = rows + planes;                         // [planes]

  // The lower triangle's tiles in row order: tile row r starts at r (r + 1) / 2.
  const int64_t tile = blockIdx.x;
  int64_t tile_row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) * 0.5);
  while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
  while (tile_row * (tile_row + 1) / 2 > tile) --tile_row;
  const int64_t tile_column = tile - tile_row * (tile_row + 1) / 2;
  const int64_t row0 = tile_row * kTile, column0 = tile_column * kTile;
  const bool diagonal = tile_row == tile_column;

  const WindowView window = windows[blockIdx.y];
  const bool along_vectors = window.vector_stride < window.element_stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, in_group = lane % 4;
  const int warp_row = (warp / 2) * 32, warp_column = (warp % 2) * 32;

  double sum[planes][2][4][4] = {};
  Slab<In, planes> row_slab, column_slab;
  row_slab.load(window, order, row0, 0, along_vectors);
  if (!diagonal) column_slab.load(window, order, column0, 0, along_vectors);

  for (int64_t depth = 0; depth < window.inner; depth += kDepth) {
    row_slab.store(rows, along_vectors);
    if (!diagonal) column_slab.store(columns, along_vectors);
    __syncthreads();
    if (depth + kDepth < window.inner) {
      row_slab.load(window, order, row0, depth + kDepth, along_vectors);
      if (!diagonal) column_slab.load(window, order, column0, depth + kDepth, along_vectors);
    }
    const Plane* right = diagonal ? rows : columns;
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      double a[planes][2][2], b[planes][4];
#pragma unroll
      for (int p = 0; p < planes; ++p) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            a[p][i][half] = rows[p][warp_row + i * 16 + half * 8 + group][k + in_group];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[p][j] = right[p][warp_column + j * 8 + group][k + in_group];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma_16x8x4(sum[0][i][j], a[0][i], b[0][j]);
          if constexpr (planes == 2) {
            // (ar + i ai)(br - i bi) = ar br + ai bi + i (ai br - ar bi)
            mma_16x8x4(sum[0][i][j], a[1][i], b[1][j]);
            mma_16x8x4(sum[1][i][j], a[1][i], b[0][j]);
            mma_16x8x4(sum[1][i][j], a[0][i], -b[1][j]);
          }
        }
    }
    __syncthreads();
  }

  const int64_t matrix = static_cast<int64_t>(blockIdx.y) * order * order;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t r = row0 + warp_row + i * 16 + (e / 2) * 8 + group;
        const int64_t c = column0 + warp_column + j * 8 + in_group * 2 + e % 2;
        // In a diagonal tile the element below the diagonal writes its mirror image too, so that the two are equal.
        if (r < order && c < order && (!diagonal || r >= c)) {
          const double re = sum[0][i][j][e];
          const double im = planes == 2 && r != c ? sum[planes - 1][i][j][e] : 0.0;
          write<Kind>(gram, single, matrix + r * order + c, re, im);
          if (r != c) write<Kind>(gram, single, matrix + c * order + r, re, -im);
        }
      }
}

template <typename In, typename Kind>
void launch(const WindowView* windows, int64_t count, int64_t order, bool single, void* gram, cudaStream_t stream) {
  const int64_t tiles = (order + kTile - 1) / kTile;
  const int shared_bytes = 2 * Kind::planes * kTile * kPitch * static_cast<int>(sizeof(double));
  FARMS_CUDA_CHECK(
      cudaFuncSetAttribute(window_gram_kernel<In, Kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int64_t matrix_bytes = order * order * (single ? 4 : 8) * Kind::planes;
  constexpr int64_t most = 65535;  // of a grid's second dimension
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t part = count - begin < most ? count - begin : most;
    const dim3 grid(static_cast<unsigned>(tiles * (tiles + 1) / 2), static_cast<unsigned>(part));
    window_gram_kernel<In, Kind><<<grid, kThreads, shared_bytes, stream>>>(
        windows + begin, order, single, static_cast<char*>(gram) + begin * matrix_bytes);
    FARMS_LAUNCH_CHECK();
  }
}

}  // namespace

void window_gram_cuda(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision, void* gram,
                      void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const bool single = precision == DType::f32;
  switch (in) {
    case DType::f16:
      return launch<__half, Real>(windows, count, order, single, gram, stream);
    case DType::bf16:
      return launch<__nv_bfloat16, Real>(windows, count, order, single, gram, stream);
    case DType::f32:
      return launch<float, Real>(windows, count, order, single, gram, stream);
    case DType::f64:
      return launch<double, Real>(windows, count, order, single, gram, stream);
    case DType::c64:
      return launch<float2, Complex>(windows, count, order, single, gram, stream);
    case DType::c128:
      return launch<double2, Complex>(windows, count, order, single, gram, stream);
  }
}

}  // namespace farms_fast
