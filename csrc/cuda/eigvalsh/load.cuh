// Windows and Gram matrices of any type as real ones. A complex Hermitian matrix of order k becomes a real symmetric
// one of order 2k with each eigenvalue twice: [[Re, -Im], [Im, Re]], rows and columns interleaved.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/cuda/eigvalsh/matrix_config.cuh"
#include "csrc/dtype.h"
#include "csrc/gram.h"

namespace farms_fast {
namespace one_stage {

constexpr int kSlabDepth = 16;  // elements of the vectors per slab
constexpr int kSlabPitch =
    kSlabDepth + 4;  // doubles per vector in shared memory: a warp's fragments then touch 32 banks

// Intrinsics for the half types: torch's build takes their operators away.
__device__ __forceinline__ double widen(__half value) { return __half2float(value); }
__device__ __forceinline__ double widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ double widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

__device__ __forceinline__ bool complex_type(DType type) { return type == DType::c64 || type == DType::c128; }

// How the threads of a block copy a window's vectors to shared memory, a slab of vectors x Depth at a time, kSlabPitch
// doubles a vector; where there are many vectors for the threads, a part of them after the other. Neighbouring threads
// take neighbouring vectors where those are nearer in memory, else neighbouring elements; a thread's vectors and
// elements are an even number apart. Hence a complex window a + ib needs no care but at the start: it counts as the
// real vectors (a, b) and (b, -a), elements interleaved, whose inner products are the real and imaginary parts of the
// Hermitian ones.
template <class Config>
class Slabs {
 public:
  __device__ __forceinline__ Slabs(const WindowView& view, DType in, int order) : data_(view.data), order_(order) {
    const bool complex = complex_type(in), along_vectors = view.vector_stride < view.element_stride;
    type_ = in == DType::c64 ? DType::f32 : in == DType::c128 ? DType::f64 : in;
    const int64_t reals = complex ? 2 : 1;
    left_ = view.inner * reals;
    const int tid = threadIdx.x;
    vector_ = along_vectors ? tid % part : tid / kSlabDepth;
    element_ = along_vectors ? tid / part : tid % kSlabDepth;
    vector_step_ = along_vectors ? 0 : threads / kSlabDepth;
    element_step_ = along_vectors ? threads / part : 0;
    static_assert(threads % kSlabDepth == 0 && threads / kSlabDepth % 2 == 0 && threads % (2 * part) == 0,
                  "even steps");
    static_assert(vectors % part == 0 && part % 2 == 0, "whole parts");
    if (complex) {
      const bool turned = vector_ & 1, second = element_ & 1;
      at_ = (vector_ >> 1) * 2 * view.vector_stride + (element_ >> 1) * 2 * view.element_stride + (turned != second);
      negative_ = turned && second;
    } else {
      at_ = vector_ * view.vector_stride + element_ * view.element_stride;
      negative_ = false;
    }
    step_ = vector_step_ * view.vector_stride + element_step_ * view.element_stride;
    slab_step_ = kSlabDepth * view.element_stride;
    part_step_ = part * view.vector_stride;
  }

  __device__ __forceinline__ bool any() const { return left_ > 0; }

  // The next slab into shared memory.
  __device__ __forceinline__ void copy(double* slab) {
    switch (type_) {
      case DType::f16:
        copy_as<__half>(slab);
        break;
      case DType::bf16:
        copy_as<__nv_bfloat16>(slab);
        break;
      case DType::f32:
        copy_as<float>(slab);
        break;
      default:
        copy_as<double>(slab);
    }
    at_ += slab_step_;
    left_ -= kSlabDepth;
  }

 private:
  static constexpr int threads = MatrixShape<Config>::threads, vectors = MatrixShape<Config>::all_rows;
  static constexpr int part = 2 * vectors <= threads ? vectors : threads / 2;

  template <typename Real>
  __device__ __forceinline__ void copy_as(double* slab) const {
    constexpr int count = part * kSlabDepth / threads, batch = 8;
    static_assert(count % batch == 0, "whole batches");
    const Real* from = static_cast<const Real*>(data_) + at_;
    double* to = slab + vector_ * kSlabPitch + element_;
    const int to_step = vector_step_ * kSlabPitch + element_step_;
#pragma unroll 1
    for (int begin = 0; begin < vectors; begin += part) {
#pragma unroll 1
      for (int i = 0; i < count; i += batch) {
        double values[batch];
#pragma unroll
        for (int j = 0; j < batch; ++j) {
          const bool inside =
              begin + vector_ + (i + j) * vector_step_ < order_ && element_ + (i + j) * element_step_ < left_;
          values[j] = inside ? widen(from[(i + j) * step_]) : 0.0;
        }
#pragma unroll
        for (int j = 0; j < batch; ++j) to[(i + j) * to_step] = negative_ ? -values[j] : values[j];
      }
      from += part_step_;
      to += part * kSlabPitch;
    }
  }

  const void* data_;
  int64_t at_, step_, slab_step_, part_step_, left_;
  int order_, vector_, element_, vector_step_, element_step_;
  DType type_;
  bool negative_;
};

// A ready Gram matrix, its lower triangle; zero outside.
struct RealMatrix {
  const void* data;
  DType type;
  int order;  // of the real matrix

  __device__ __forceinline__ double operator()(int row, int column) const {
    if (row >= order || column >= order) return 0.0;
    if (!complex_type(type)) {
      const int64_t at = static_cast<int64_t>(max(row, column)) * order + min(row, column);
      return type == DType::f64 ? static_cast<const double*>(data)[at] : static_cast<const float*>(data)[at];
    }
    // The element (r, c) of the complex matrix, r >= c, is re + i im, and re - i im is its mirror image.
    const int r = max(row >> 1, column >> 1), c = min(row >> 1, column >> 1);
    const bool imaginary = (row ^ column) & 1;
    if (imaginary && r == c) return 0.0;
    const int64_t at = (static_cast<int64_t>(r) * (order / 2) + c) * 2 + imaginary;
    const double value =
        type == DType::c128 ? static_cast<const double*>(data)[at] : static_cast<const float*>(data)[at];
    const bool mirrored = (row >> 1) < (column >> 1);
    return imaginary && (((row & 1) == 0) != mirrored) ? -value : value;
  }
};

}  // namespace one_stage
}  // namespace farms_fast
