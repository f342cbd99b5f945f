// One 64 x 64 tile of products of vectors, on the tensor cores in float64, by a block of four warps, 32 x 32 each.
// Vectors are read in place, whatever their strides and type, and converted on the way into one of two stages of shared
// memory, 16 elements of each vector at a time. One barrier a step orders both ways: after it the next stage is filled
// for all, and the one just read may be written again.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/cuda/hopper.h"
#include "csrc/cuda/mma.cuh"
#include "csrc/dtype.h"

namespace farms_fast {
namespace gram_tile {

constexpr int kGramTile = 64;   // rows and columns of a block's tile
constexpr int kGramDepth = 16;  // elements of the vectors per step
constexpr int kGramThreads = 128;
constexpr int kWarpTile = 32;                                      // rows and columns of a warp's part of the tile
constexpr int kWarpsAcross = kGramTile / kWarpTile;                // warps side by side
constexpr int kPerThread = kGramTile * kGramDepth / kGramThreads;  // a thread's elements of a slab ...
constexpr int kVectorStep = kGramThreads / kGramDepth;             // ... which are so many vectors apart,
constexpr int kElementStep = kGramThreads / kGramTile;             // or so many elements of one vector
constexpr int kRowParts = kWarpTile / 16, kColumnParts = kWarpTile / 8;

// Planes: of real numbers that a product has. Of a thread's registers 64 a plane are for its sums; three blocks leave
// it 168, two 255. Double-precision complex products spill all the same, 208 bytes.
struct RealProducts {
  static constexpr int planes = 1, blocks_per_processor = 3;
};
struct ComplexProducts {
  static constexpr int planes = 2, blocks_per_processor = 2;
};

// The real or imaginary part of a weight's element. Intrinsics for the half types: torch's build takes their operators
// away.
__device__ __forceinline__ double plane_of(__half value, int) { return __half2float(value); }
__device__ __forceinline__ double plane_of(__nv_bfloat16 value, int) { return __bfloat162float(value); }
__device__ __forceinline__ double plane_of(float value, int) { return value; }
__device__ __forceinline__ double plane_of(double value, int) { return value; }
__device__ __forceinline__ double plane_of(const float2& value, int plane) { return plane ? value.y : value.x; }
__device__ __forceinline__ double plane_of(const double2& value, int plane) { return plane ? value.y : value.x; }

// Where element t of vector v lies in a slab of shared memory is v * kGramDepth + (t ^ swizzle(v)): then a warp's
// fragment loads touch each bank once, and so do its stores, be they along a vector or across vectors.
__device__ __forceinline__ constexpr int swizzle(int v) { return (v & 3) * 4 + (v / 4 & 3); }

// One thread's share of a kGramTile x kGramDepth slab of vectors: global memory to registers, then registers to shared
// memory, so that a later slab's loads are in flight while this one is multiplied.
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
        store_one(slab, (first ^ swizzle(i * kVectorStep)) + i * kVectorStep * kGramDepth, values[i]);
    }
  }

  static __device__ __forceinline__ void store_one(double* slab, int at, const In& value) {
#pragma unroll
    for (int plane = 0; plane < Planes; ++plane) slab[plane * kGramTile * kGramDepth + at] = plane_of(value, plane);
  }
};

// What a warp's products of one depth need of its 32 rows and 32 columns: left and right operands of the 2 x 4
// fragments of 16 x 8 that they are made of (see mma.cuh).
template <int Planes>
struct WarpOperands {
  static constexpr int depth = Planes == 1 ? 8 : 4;
  double a[Planes][kRowParts][depth / 2], b[Planes][kColumnParts][depth / 4];

  // row, column: group * kGramDepth + (in_group ^ swizzle(group)), from the warp's first row and first column.
  __device__ __forceinline__ void load(const double* row_slab, const double* column_slab, int row, int column, int k) {
#pragma unroll
    for (int p = 0; p < Planes; ++p) {
      const int plane = p * kGramTile * kGramDepth;
#pragma unroll
      for (int d = 0; d < depth / 4; ++d) {
#pragma unroll
        for (int i = 0; i < kRowParts; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            a[p][i][d * 2 + half] =
                row_slab[plane + (row ^ (k + d * 4) ^ swizzle(half * 8)) + (i * 16 + half * 8) * kGramDepth];
#pragma unroll
        for (int j = 0; j < kColumnParts; ++j)
          b[p][j][d] = column_slab[plane + (column ^ (k + d * 4) ^ swizzle(j * 8)) + j * 8 * kGramDepth];
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

// Products of the vectors from row0 on with those from column0 on, over any piece of their elements.
template <typename In, typename Kind>
class TileProduct {
 public:
  static constexpr int planes = Kind::planes;
  static constexpr int slab_size = planes * kGramTile * kGramDepth;
  // Of [2 stages][rows, columns][slab_size]. A whole tile of sums fits in as well.
  static constexpr int shared_bytes = 4 * slab_size * static_cast<int>(sizeof(double));
  static_assert(hopper::shared_memory_holds(Kind::blocks_per_processor, shared_bytes));
  using Sums = double[planes][kRowParts][kColumnParts][4];

  // Vectors from `count` on are not read.
  __device__ __forceinline__ TileProduct(const void* data, int64_t vector_stride, int64_t element_stride, int64_t count,
                                         int64_t row0, int64_t column0)
      : along_vectors_(vector_stride < element_stride), diagonal_(row0 == column0) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32, lane = thread % 32, group = lane / 4, in_group = lane % 4;
    const int warp_row = warp / kWarpsAcross * kWarpTile, warp_column = warp % kWarpsAcross * kWarpTile;
    needed_ =
        row0 + warp_row < count && column0 + warp_column < count && row0 + warp_row + kWarpTile > column0 + warp_column;

    // A thread's elements of a slab: the first, and how many of them the vectors' number leaves.
    const int vector = along_vectors_ ? thread % kGramTile : thread / kGramDepth;
    element_ = along_vectors_ ? thread / kGramTile : thread % kGramDepth;
    slab_offset_ = vector * kGramDepth + (element_ ^ swizzle(vector));
    step_ = along_vectors_ ? kElementStep * element_stride : kVectorStep * vector_stride;
    element_stride_ = element_stride;
    row_data_ = static_cast<const In*>(data) + (row0 + vector) * vector_stride + element_ * element_stride;
    column_data_ = row_data_ + (column0 - row0) * vector_stride;
    const auto rounds = [](int64_t left, int apart) {
      const int64_t rounded = (left + apart - 1) / apart;
      return static_cast<int>(left <= 0 ? 0 : rounded < kPerThread ? rounded : kPerThread);
    };
    row_vectors_ = rounds(count - row0 - vector, along_vectors_ ? kGramTile : kVectorStep);
    column_vectors_ = rounds(count - column0 - vector, along_vectors_ ? kGramTile : kVectorStep);

    const int fragment = group * kGramDepth + (in_group ^ swizzle(group));
    row_fragment_ = fragment + warp_row * kGramDepth;
    column_fragment_ = fragment + warp_column * kGramDepth + (diagonal_ ? 0 : slab_size);
  }

  // Adds the products of elements [begin, end). The whole block calls; shared memory is free before and after.
  __device__ __forceinline__ void add(int64_t begin, int64_t end, double* shared_memory, Sums& sum) const {
    // Slabs are loaded two steps ahead and stored beside the products, where there are registers for it.
    constexpr bool early = planes == 1;
    using Operands = WarpOperands<planes>;
    const In* row_from = row_data_ + begin * element_stride_;
    const In* column_from = column_data_ + begin * element_stride_;
    const int64_t advance = kGramDepth * element_stride_;
    int64_t left = end - begin - element_;  // elements of a vector from this thread's first on
    const auto valid = [&](int vectors) {
      const int near = static_cast<int>(left < kGramDepth ? left : kGramDepth);
      const int elements = (near + kElementStep - 1) / kElementStep;
      return along_vectors_ ? (vectors > 0 ? elements : 0) : (near > 0 ? vectors : 0);
    };
    Slab<In, planes> row_slab, column_slab;
    const auto load_rows = [&] {
      row_slab.load(row_from, step_, valid(row_vectors_));
      row_from += advance;
    };
    const auto load_columns = [&] {
      if (!diagonal_) column_slab.load(column_from, step_, valid(column_vectors_));
      column_from += advance;
      left -= kGramDepth;
    };
    const auto store_rows = [&](double* stage) { row_slab.store(stage, slab_offset_, along_vectors_); };
    const auto store_columns = [&](double* stage) {
      if (!diagonal_) column_slab.store(stage + slab_size, slab_offset_, along_vectors_);
    };

    load_rows();
    load_columns();
    store_rows(shared_memory);
    store_columns(shared_memory);
    if (early) {
      load_rows();
      load_columns();
    }
    __syncthreads();
    // The barrier that ends a step both fills the next stage and frees this one. Past the last step the loads give
    // zeros and the stores go to a stage that nothing reads.
    const int64_t steps = (end - begin + kGramDepth - 1) / kGramDepth;
    for (int64_t s = 0; s < steps; ++s) {
      double* stage = shared_memory + (s & 1) * 2 * slab_size;
      double* next = shared_memory + (~s & 1) * 2 * slab_size;
#pragma unroll
      for (int k = 0; k < kGramDepth; k += Operands::depth) {
        Operands operands;
        if (needed_) operands.load(stage, stage, row_fragment_, column_fragment_, k);
        if (k == 0) {
          if (early) store_rows(next);
          load_rows();
        }
        if (k == (early ? kGramDepth / 2 : 0)) {
          if (early) store_columns(next);
          load_columns();
        }
        if (needed_) operands.multiply(sum);
      }
      if (!early) {
        store_rows(next);
        store_columns(next);
      }
      __syncthreads();
    }
  }

  // Calls visit(number, row, column, real part, imaginary part) for each of the thread's sums, rows and columns counted
  // from the tile's first. The imaginary part of real products means nothing.
  template <typename Visit>
  static __device__ __forceinline__ void for_each(const Sums& sum, const Visit& visit) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32, lane = thread % 32, group = lane / 4, in_group = lane % 4;
    const int warp_row = warp / kWarpsAcross * kWarpTile, warp_column = warp % kWarpsAcross * kWarpTile;
#pragma unroll
    for (int i = 0; i < kRowParts; ++i)
#pragma unroll
      for (int j = 0; j < kColumnParts; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          visit((i * kColumnParts + j) * 4 + e, warp_row + i * 16 + (e / 2) * 8 + group,
                warp_column + j * 8 + in_group * 2 + e % 2, sum[0][i][j][e], sum[planes - 1][i][j][e]);
  }

  static __device__ __forceinline__ void clear(Sums& sum) {
#pragma unroll
    for (int p = 0; p < planes; ++p)
#pragma unroll
      for (int i = 0; i < kRowParts; ++i)
#pragma unroll
        for (int j = 0; j < kColumnParts; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[p][i][j][e] = 0;
  }

 private:
  bool along_vectors_;  // neighbouring threads load neighbouring vectors
  bool diagonal_;       // rows and columns are the same vectors
  bool needed_;         // not all of this warp's products are above the diagonal or beyond the vectors
  int element_, slab_offset_, row_vectors_, column_vectors_, row_fragment_, column_fragment_;
  int64_t step_, element_stride_;
  const In* row_data_;
  const In* column_data_;
};

// Stores one element of the Gram matrix.
template <typename Kind>
__device__ __forceinline__ void write(void* gram, bool to_float32, int64_t at, double re, double im) {
  if constexpr (Kind::planes == 1) {
    if (to_float32)
      static_cast<float*>(gram)[at] = static_cast<float>(re);
    else
      static_cast<double*>(gram)[at] = re;
  } else {
    if (to_float32)
      static_cast<float2*>(gram)[at] = make_float2(static_cast<float>(re), static_cast<float>(im));
    else
      static_cast<double2*>(gram)[at] = make_double2(re, im);
  }
}

// Calls run with a value of the weight's type and one of its kind, for their types.
template <typename Run>
void dispatch_weight(DType in, const Run& run) {
  switch (in) {
    case DType::f16:
      return run(__half{}, RealProducts{});
    case DType::bf16:
      return run(__nv_bfloat16{}, RealProducts{});
    case DType::f32:
      return run(float{}, RealProducts{});
    case DType::f64:
      return run(double{}, RealProducts{});
    case DType::c64:
      return run(float2{}, ComplexProducts{});
    case DType::c128:
      return run(double2{}, ComplexProducts{});
  }
}

}  // namespace gram_tile
}  // namespace farms_fast
