// Eigenvalues of a tridiagonal matrix that a block holds in its shared memory, two neighbouring lanes each.
#pragma once

#include "csrc/cuda/eigvalsh/matrix_config.cuh"
#include "csrc/cuda/eigvalsh/sturm.cuh"
#include "csrc/cuda/warp.cuh"

namespace farms_fast {
namespace one_stage {

template <class Config>
class Spectrum {
 public:
  // Finds the eigenvalues with numbers [first, end), at most half as many as threads, of them, and calls store(number,
  // value) from one thread each. stride 2 leaves out every second of a complex matrix's doubled eigenvalues. Sections:
  // how often the block narrows the interval for all of them before each search goes on by itself. Returns log2 of what
  // the values are to be multiplied with. By every thread of the block; no barrier at the end.
  template <int Sections, typename Store>
  __device__ __forceinline__ int find(const double* diagonal, const double* off, int order, int stride, int first,
                                      int end, const Store& store) {
    const sturm::Range scaled = range(diagonal, off, order);
    const int half = (order + 2 * sturm::kGroup - 1) / (2 * sturm::kGroup) * sturm::kGroup;
    fill(diagonal, off, order, half, scaled.scale);
    __syncthreads();

    const int pair = static_cast<int>(threadIdx.x) / 2;
    const sturm::Row* mine = rows_ + (threadIdx.x & 1 ? half + 1 : 0);
    const auto evaluate = [&](double x) {
      sturm::Minors minors;
      minors.advance(mine, half, x);
      return minors.joined(x, rows_[half].square);
    };
    const int number = min(first + pair, end - 1);
    sturm::Point low{scaled.low, 0.0, 0, 0}, high{scaled.high, 0.0, 0, order};
    for (int section = 0; section < Sections; ++section) {
      const double step = (high.x - low.x) / (kPairs + 1);
      const sturm::Point point = evaluate(low.x + step * (pair + 1));
      __syncthreads();
      if ((threadIdx.x & 1) == 0) points_[pair + 1] = point;
      if (threadIdx.x == 0) {
        points_[0] = low;
        points_[kPairs + 1] = high;
      }
      __syncthreads();
      const bool last = section + 1 == Sections;
      low = points_[sturm::below(points_, kPairs + 2, (last ? number : first) * stride)];
      high = points_[sturm::below(points_, kPairs + 2, (last ? number : end - 1) * stride) + 1];
    }

    if (first + static_cast<int>(threadIdx.x & ~31u) / 2 >= end) return scaled.exponent;
    sturm::Search search(number * stride, low, high);
    while (__any_sync(kAllLanes, !search.done())) {
      const sturm::Point point = evaluate(search.next());
      if (!search.done()) search.update(point);
    }
    if (first + pair < end && (threadIdx.x & 1) == 0) store(number, search.result());
    return scaled.exponent;
  }

 private:
  static constexpr int kThreads = MatrixShape<Config>::threads, kRows = MatrixShape<Config>::all_rows;
  static constexpr int kPairs = kThreads / 2;

  // Every warp for itself.
  static __device__ __forceinline__ sturm::Range range(const double* diagonal, const double* off, int order) {
    double low = INFINITY, high = -INFINITY;
    for (int i = threadIdx.x % 32; i < order; i += 32) {
      const double radius = (i > 0 ? fabs(off[i - 1]) : 0.0) + (i < order - 1 ? fabs(off[i]) : 0.0);
      low = fmin(low, diagonal[i] - radius);
      high = fmax(high, diagonal[i] + radius);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      low = fmin(low, __shfl_xor_sync(kAllLanes, low, offset));
      high = fmax(high, __shfl_xor_sync(kAllLanes, high, offset));
    }
    return sturm::scaled_range(low, high, true);
  }

  // The first half of the rows; a row that only couples the halves; the second half from the end, each row with the
  // square that couples it to the one after it.
  __device__ __forceinline__ void fill(const double* diagonal, const double* off, int order, int half, double scale) {
    const auto make = [&](int row, int coupled) {
      if (row >= order) return sturm::kPadding;
      const bool alone = coupled <= 0 || coupled >= order;
      return sturm::make_row(diagonal[row] * scale, alone ? 0.0 : off[coupled - 1] * scale, alone);
    };
    for (int i = threadIdx.x; i < half; i += kThreads) {
      rows_[i] = make(i, i);
      const int from_end = 2 * half - 1 - i;
      rows_[half + 1 + i] = make(from_end, from_end + 1);
    }
    if (threadIdx.x == 0) rows_[half] = make(half, half);
  }

  sturm::Row rows_[kRows + 1];
  sturm::Point points_[kPairs + 2];
};

// Neighbours equal to within their brackets' width may come out in either order: the largest up to and including i.
__device__ __forceinline__ double ascending(const double* values, int i) {
  double largest = values[i];
  // The widest cluster whose values a bracket's width can hold reaches back no further than its first member.
  for (int j = i - 1; j >= 0 && values[j] > values[i] - 4 * sturm::kWidth; --j) largest = fmax(largest, values[j]);
  return largest;
}

}  // namespace one_stage
}  // namespace farms_fast
