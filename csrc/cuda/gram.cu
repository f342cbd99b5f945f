// Gram matrices of windows on the tensor cores in float64. A block forms one 64 x 64 tile of one window's Gram matrix,
// of the lower triangle only; the mirrored tile is written with it. Windows are read in place, whatever their strides
// and type, and converted on the way into one of two stages of shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../gram.h"
#include "check.h"
#include "mma.cuh"

namespace farms_fast {
namespace {

constexpr int kTile = 64;   // rows and columns of a block's tile
constexpr int kDepth = 16;  // elements of the vectors per step
constexpr int kThreads = 128;
constexpr int kWarpTile = 32;                          // rows and columns of a warp's part of the tile
constexpr int kWarpsAcross = kTile / kWarpTile;        // warps side by side
constexpr int kPerThread = kTile * kDepth / kThreads;  // a thread's elements of a slab ...
constexpr int kVectorStep = kThreads / kDepth;         // ... which are so many vectors apart,
constexpr int kElementStep = kThreads / kTile;         // or so many elements of one vector
constexpr int kRowParts = kWarpTile / 16, kColumnParts = kWarpTile / 8;

struct Real {
  static constexpr int planes = 1;
  static constexpr int blocks = 3;  // of a multiprocessor
};
struct Complex {
  static constexpr int planes = 2;  // real and imaginary parts
  static constexpr int blocks = 2;
};

// The real or imaginary part of a weight's element. Intrinsics for the half types: torch's build takes their operators
// away.
__device__ __forceinline__ double plane_of(__half value, int) { return __half2float(value); }
__device__ __forceinline__ double plane_of(__nv_bfloat16 value, int) { return __bfloat162float(value); }
__device__ __forceinline__ double plane_of(float value, int) { return value; }
__device__ __forceinline__ double plane_of(double value, int) { return value; }
__device__ __forceinline__ double plane_of(const float2& value, int plane) { return plane ? value.y : value.x; }
__device__ __forceinline__ double plane_of(const double2& value, int plane) { return plane ? value.y : value.x; }

// Where element t of vector v lies in a slab of shared memory is v * kDepth + (t ^ swizzle(v)): then a warp's fragment
// loads touch each bank once, and so do its stores, be they along a vector or across vectors.
__device__ __forceinline__ constexpr int swizzle(int v) { return (v & 3) * 4 + (v / 4 & 3); }

// One thread's share of a kTile x kDepth slab of vectors: global memory to registers, then registers to shared memory,
// so that a later slab's loads are in flight while this one is multiplied.
template <typename In, int Planes>
struct Slab {
  In values[kPerThread];

  // The first `valid` of a thread's elements, `step` apart; zeros for the others.
  __device__ __forceinline__ void load(const In* from, int64_t step, int valid) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i, from += step) {
      values[i] = In{};  // zero bits are 0 in every type
      if (i < valid) values[i] = __ldg(from);
    }
  }

  // `along_vectors`: neighbouring threads have neighbouring vectors (the smaller stride), else neighbouring elements.
  __device__ __forceinline__ void store(double* slab, int first, bool along_vectors) const {
    if (along_vectors) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) store_one(slab, first ^ (i * kElementStep), values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        store_one(slab, (first ^ swizzle(i * kVectorStep)) + i * kVectorStep * kDepth, values[i]);
    }
  }

  static __device__ __forceinline__ void store_one(double* slab, int at, const In& value) {
#pragma unroll
    for (int plane = 0; plane < Planes; ++plane) slab[plane * kTile * kDepth + at] = plane_of(value, plane);
  }
};

// What a warp's products of one depth need of its rows and columns.
template <int Planes>
struct Fragments {
  static constexpr int depth = Planes == 1 ? 8 : 4;
  double a[Planes][kRowParts][depth / 2], b[Planes][kColumnParts][depth / 4];

  // row, column: group * kDepth + (in_group ^ swizzle(group)), from the warp's first row and first column.
  __device__ __forceinline__ void load(const double* row_slab, const double* column_slab, int row, int column, int k) {
#pragma unroll
    for (int p = 0; p < Planes; ++p) {
      const int plane = p * kTile * kDepth;
#pragma unroll
      for (int d = 0; d < depth / 4; ++d) {
#pragma unroll
        for (int i = 0; i < kRowParts; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            a[p][i][d * 2 + half] =
                row_slab[plane + (row ^ (k + d * 4) ^ swizzle(half * 8)) + (i * 16 + half * 8) * kDepth];
#pragma unroll
        for (int j = 0; j < kColumnParts; ++j)
          b[p][j][d] = column_slab[plane + (column ^ (k + d * 4) ^ swizzle(j * 8)) + j * 8 * kDepth];
      }
    }
  }

  __device__ __forceinline__ void multiply(double (&sum)[Planes][kRowParts][kColumnParts][4]) const {
#pragma unroll
    for (int i = 0; i < kRowParts; ++i)
#pragma unroll
      for (int j = 0; j < kColumnParts; ++j) {
        if constexpr (Planes == 1) {
          mma_16x8x8(sum[0][i][j], a[0][i], b[0][j]);
        } else {
          // (ar + i ai)(br - i bi) = ar br + ai bi + i (ai br - ar bi)
          mma_16x8x4(sum[0][i][j], a[0][i], b[0][j][0]);
          mma_16x8x4(sum[0][i][j], a[1][i], b[1][j][0]);
          mma_16x8x4(sum[1][i][j], a[1][i], b[0][j][0]);
          mma_16x8x4(sum[1][i][j], a[0][i], -b[1][j][0]);
        }
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
__global__ void __launch_bounds__(kThreads, Kind::blocks)
    window_gram_kernel(const WindowView* __restrict__ windows, int64_t order, bool single, void* __restrict__ gram) {
  constexpr int planes = Kind::planes;
  constexpr int slab_size = planes * kTile * kDepth;
  // Slabs are loaded two steps ahead and stored beside the products, where there are registers for it.
  constexpr bool early = planes == 1;
  using Part = Fragments<planes>;
  using OwnSlab = Slab<In, planes>;
  extern __shared__ __align__(16) double shared_memory[];  // [2 stages][rows, columns][slab_size]

  // The lower triangle's tiles in row order: tile row r starts at r (r + 1) / 2.
  const int64_t tile = blockIdx.x;
  int64_t tile_row = static_cast<int64_t>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
  while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
  while (tile_row * (tile_row + 1) / 2 > tile) --tile_row;
  const int64_t tile_column = tile - tile_row * (tile_row + 1) / 2;
  const int64_t row0 = tile_row * kTile, column0 = tile_column * kTile;
  const bool diagonal = tile_row == tile_column;

  const WindowView window = windows[blockIdx.y];
  const bool along_vectors = window.vector_stride < window.element_stride;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32, group = lane / 4, in_group = lane % 4;
  const int warp_row = warp / kWarpsAcross * kWarpTile, warp_column = warp % kWarpsAcross * kWarpTile;
  // A warp whose products are all outside of the matrix or above its diagonal leaves them out.
  const bool needed =
      row0 + warp_row < order && column0 + warp_column < order && row0 + warp_row + kWarpTile > column0 + warp_column;

  // A thread's elements of a slab: the first, and how many of them the matrix's order leaves.
  const int vector = along_vectors ? thread % kTile : thread / kDepth;
  const int element = along_vectors ? thread / kTile : thread % kDepth;
  const int place = vector * kDepth + (element ^ swizzle(vector));
  const int64_t step = along_vectors ? kElementStep * window.element_stride : kVectorStep * window.vector_stride;
  const int64_t advance = kDepth * window.element_stride;
  const In* row_from =
      static_cast<const In*>(window.data) + (row0 + vector) * window.vector_stride + element * window.element_stride;
  const In* column_from = row_from + (column0 - row0) * window.vector_stride;
  const auto rounds = [](int64_t left, int apart) {
    const int64_t count = (left + apart - 1) / apart;
    return static_cast<int>(left <= 0 ? 0 : count < kPerThread ? count : kPerThread);
  };
  const int row_vectors = rounds(order - row0 - vector, along_vectors ? kTile : kVectorStep);
  const int column_vectors = rounds(order - column0 - vector, along_vectors ? kTile : kVectorStep);
  int64_t left = window.inner - element;  // elements of a vector from this thread's first on
  const auto valid = [&](int vectors) {
    const int near = static_cast<int>(left < kDepth ? left : kDepth);
    const int elements = (near + kElementStep - 1) / kElementStep;
    return along_vectors ? (vectors > 0 ? elements : 0) : (near > 0 ? vectors : 0);
  };

  OwnSlab row_slab, column_slab;
  const auto load_rows = [&] {
    row_slab.load(row_from, step, valid(row_vectors));
    row_from += advance;
  };
  const auto load_columns = [&] {
    if (!diagonal) column_slab.load(column_from, step, valid(column_vectors));
    column_from += advance;
    left -= kDepth;
  };
  const auto store_rows = [&](double* stage) { row_slab.store(stage, place, along_vectors); };
  const auto store_columns = [&](double* stage) {
    if (!diagonal) column_slab.store(stage + slab_size, place, along_vectors);
  };

  double sum[planes][kRowParts][kColumnParts][4] = {};
  const int fragment = group * kDepth + (in_group ^ swizzle(group));
  const int row_fragment = fragment + warp_row * kDepth;
  const int column_fragment = fragment + warp_column * kDepth + (diagonal ? 0 : slab_size);

  load_rows();
  load_columns();
  store_rows(shared_memory);
  store_columns(shared_memory);
  if (early) {
    load_rows();
    load_columns();
  }
  __syncthreads();
  // The barrier that ends a step both fills the next stage and frees this one. Past the last step the loads give zeros
  // and the stores go to a stage that nothing reads.
  const int64_t steps = (window.inner + kDepth - 1) / kDepth;
  for (int64_t s = 0; s < steps; ++s) {
    double* stage = shared_memory + (s & 1) * 2 * slab_size;
    double* next = shared_memory + (~s & 1) * 2 * slab_size;
#pragma unroll
    for (int k = 0; k < kDepth; k += Part::depth) {
      Part part;
      if (needed) part.load(stage, stage, row_fragment, column_fragment, k);
      if (k == 0) {
        if (early) store_rows(next);
        load_rows();
      }
      if (k == (early ? kDepth / 2 : 0)) {
        if (early) store_columns(next);
        load_columns();
      }
      if (needed) part.multiply(sum);
    }
    if (!early) {
      store_rows(next);
      store_columns(next);
    }
    __syncthreads();
  }

  const int64_t matrix = static_cast<int64_t>(blockIdx.y) * order * order;
#pragma unroll
  for (int i = 0; i < kRowParts; ++i)
#pragma unroll
    for (int j = 0; j < kColumnParts; ++j)
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
  const auto kernel = window_gram_kernel<In, Kind>;
  constexpr int shared_bytes = 4 * Kind::planes * kTile * kDepth * static_cast<int>(sizeof(double));
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int64_t matrix_bytes = order * order * (single ? 4 : 8) * Kind::planes;
  constexpr int64_t most = 65535;  // of a grid's second dimension
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t part = count - begin < most ? count - begin : most;
    const dim3 grid(static_cast<unsigned>(tiles * (tiles + 1) / 2), static_cast<unsigned>(part));
    kernel<<<grid, kThreads, shared_bytes, stream>>>(windows + begin, order, single,
                                                     static_cast<char*>(gram) + begin * matrix_bytes);
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
