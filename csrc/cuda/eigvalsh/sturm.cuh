// Eigenvalues of a symmetric tridiagonal matrix from Sturm counts: the number of sign changes in the sequence of
// leading principal minors of T - x I is the number of eigenvalues below x. Each eigenvalue is found on its own, by
// index, inside a bracket whose ends have counts on either side of the index.
//
// The matrix comes scaled so that its Gershgorin interval lies in (-1/2, 1/2). Minors follow from the one before and
// the one before that by two products, with no division: p[i] = (d[i] - x) p[i-1] - e[i-1]^2 p[i-2]. Each step's
// rounding is a relative change of d[i] - x and of e[i-1]^2, so every count is exact for a matrix within a few
// roundings of T.
#pragma once

#include <cstdint>

#include "csrc/cuda/warp.cuh"

namespace farms_fast {
namespace sturm {

// Off-diagonal elements no larger than 2^-58 are replaced by it: as much below the rounding of the largest eigenvalue,
// and it keeps two neighbouring minors from vanishing together, so that no pivot needs care.
constexpr double kLeastSquare = 0x1p-116;

// A minor shrinks by less than 2^117 in a step, so eight steps stay inside the exponent range.
constexpr int kGroup = 8;

// A bracket no wider than this is an eigenvalue: one unit in the last place of the largest magnitude.
constexpr double kWidth = 0x1p-53;

// One row of the matrix: its diagonal element and the square of the element that couples it to the row before.
struct __align__(16) Row {
  double diagonal;
  double square;
};

// Rows past the order: they change no sign and no count.
constexpr Row kPadding{1.0, 0.0};

// The last minor at x is value * 2^exponent.
struct Point {
  double x;
  double value;
  int exponent;
  int count;
};

// The recurrence under way, so that a long matrix can pass through shared memory in pieces.
struct Minors {
  double last = 1.0, before = 0.0;
  int exponent = 0, count = 0;

  // rows: a multiple of kGroup of them.
  __device__ __forceinline__ void advance(const Row* __restrict__ rows, int n, double x) {
    for (int i = 0; i < n; i += kGroup) {
#pragma unroll
      for (int u = 0; u < kGroup; ++u) {
        const Row row = rows[i + u];
        const double next = (row.diagonal - x) * last - row.square * before;
        count += static_cast<unsigned>(__double2hiint(next) ^ __double2hiint(last)) >> 31;
        before = last;
        last = next;
      }
      // Both by the power of two that brings the larger into [1, 2).
      const int high = max(__double2hiint(last) & 0x7fffffff, __double2hiint(before) & 0x7fffffff) >> 20;
      const double scale = __hiloint2double((2046 - high) << 20, 0);
      last *= scale;
      before *= scale;
      exponent += high - 1023;
    }
  }

  __device__ __forceinline__ Point at(double x) const { return {x, last, exponent, count}; }

  // Two neighbouring lanes took one half of the rows each, the odd one its half from the last row up; `square` couples
  // the halves. Both get the same point: with T's first half eliminated from above and the rest from below, the rows
  // next to each other at the end leave the pivot det / (last of above * before of below).
  __device__ __forceinline__ Point joined(double x, double square) const {
    const double other_last = __shfl_xor_sync(kAllLanes, last, 1), other_before = __shfl_xor_sync(kAllLanes, before, 1);
    const int exponents = exponent + __shfl_xor_sync(kAllLanes, exponent, 1);
    const int counts = count + __shfl_xor_sync(kAllLanes, count, 1);
    const double determinant = last * other_last - square * (before * other_before);
    const bool below = threadIdx.x & 1;
    const int above_last = __double2hiint(below ? other_last : last);
    const int below_last = __double2hiint(below ? last : other_last);
    const int below_before = __double2hiint(below ? before : other_before);
    const int replaced = static_cast<unsigned>(below_last ^ below_before) >> 31;
    const int pivot = static_cast<unsigned>(__double2hiint(determinant) ^ above_last ^ below_before) >> 31;
    return {x, determinant, exponents, counts - replaced + pivot};
  }
};

// The scale of a matrix and the interval that holds all eigenvalues of the scaled one. Its own are 2^exponent times
// those.
struct Range {
  double low, high, scale;
  int exponent;
  bool finite;
};

// low, high: the Gershgorin interval of the unscaled matrix.
__device__ __forceinline__ Range scaled_range(double low, double high, bool finite) {
  const double largest = fmax(fabs(low), fabs(high));
  // What is smaller counts as zero, and no power of two brings zeros to the middle of the exponent range.
  if (largest < 0x1p-1000) return {-2 * kWidth, 2 * kWidth, 0.0, -4000, finite};
  const int exponent = ilogb(largest) + 2;
  const double scale = scalbn(1.0, -exponent);
  return {low * scale - 2 * kWidth, high * scale + 2 * kWidth, scale, exponent, finite && largest < 0x1p1021};
}

__device__ __forceinline__ Row make_row(double diagonal, double coupling, bool first) {
  return {diagonal, first ? 0.0 : fmax(coupling * coupling, kLeastSquare)};
}

// Of points in ascending order, the first with none below it and the last with all: the last but one at most with no
// more than `index` eigenvalues below it.
__device__ __forceinline__ int below(const Point* points, int n, int index) {
  int low = 0, high = n - 1;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (points[middle].count > index)
      high = middle;
    else
      low = middle;
  }
  return low;
}

// value * 2^(exponent - reference), 0 where that is out of range. exponent <= reference.
__device__ __forceinline__ double relative_value(const Point& point, int reference) {
  const int shift = point.exponent - reference;
  return shift < -1000 ? 0.0 : point.value * __hiloint2double((1023 + shift) << 20, 0);
}

// The search for the eigenvalue with a given index (0 for the smallest). Bisection by counts until the bracket holds
// that eigenvalue alone, then inverse quadratic interpolation of the last minor where Chandrupatla's criterion trusts
// it (Advances in Engineering Software 28, 1997); the ends always move by the counts.
class Search {
 public:
  __device__ __forceinline__ Search(int index, const Point& low, const Point& high)
      : index_(index), newest_(low), other_(high), oldest_(high) {}

  __device__ __forceinline__ bool done() const {
    return fabs(newest_.x - other_.x) <= kWidth || rounds_ >= kMostRounds;
  }

  __device__ __forceinline__ double result() const { return 0.5 * (newest_.x + other_.x); }

  __device__ __forceinline__ double next() const {
    const double span = other_.x - newest_.x;
    double t = 0.5;
    if (abs(newest_.count - other_.count) == 1 && rounds_ % 4 != 3) {
      const int reference = max(newest_.exponent, max(other_.exponent, oldest_.exponent));
      const double f1 = relative_value(newest_, reference), f2 = relative_value(other_, reference),
                   f3 = relative_value(oldest_, reference);
      const double xi = (newest_.x - other_.x) / (oldest_.x - other_.x), phi = (f1 - f2) / (f3 - f2);
      // False for the NaN of equal values, too.
      if (phi * phi < xi && (1.0 - phi) * (1.0 - phi) < 1.0 - xi)
        t = f1 / (f2 - f1) * (f3 / (f2 - f3)) + (oldest_.x - newest_.x) / span * (f1 / (f3 - f1)) * (f2 / (f3 - f2));
    }
    const double least = 0.5 * kWidth / fabs(span);
    t = fmin(fmax(t, least), 1.0 - least);
    return newest_.x + t * span;
  }

  __device__ __forceinline__ void update(const Point& point) {
    if ((point.count > index_) == (newest_.count > index_)) {
      oldest_ = newest_;
    } else {
      oldest_ = other_;
      other_ = newest_;
    }
    newest_ = point;
    ++rounds_;
  }

  __device__ __forceinline__ int rounds() const { return rounds_; }

 private:
  // Every fourth round halves the bracket at least: 53 bits are never more than this many rounds.
  static constexpr int kMostRounds = 240;

  int index_;
  int rounds_ = 0;
  Point newest_, other_, oldest_;
};

}  // namespace sturm
}  // namespace farms_fast
