// Kolmogorov-Smirnov distance of one tail by branch and bound, a warp for each tail.
#pragma once

#include <cuda_runtime.h>

#include "csrc/cuda/warp.cuh"
#include "csrc/power_law_common.h"

namespace farms_fast {
namespace power_law {

// Intervals up to this width are evaluated point by point.
constexpr int64_t kDirectWidth = 128;
// 128 * 32^8 values is more than any device holds.
constexpr int kMaxDepth = 8;

// Largest gap of one tail, by a whole warp. Returns D exactly, or, when some gap exceeds the best D
// of the spectrum so far, that gap.
class WarpDistanceSearch {
 public:
  __device__ WarpDistanceSearch(const Tail& tail, const unsigned long long* best_bits)
      : tail_(tail), best_bits_(best_bits), lane_(lane_id()) {}

  __device__ double run() {
    if (tail_.last - tail_.first <= kDirectWidth) {
      evaluate_all(tail_.first, tail_.last);
      return largest_;
    }
    int depth = 0;
    open(depth, tail_.first, tail_.last, 0.0);
    while (true) {
      const double widest = warp_max(bound_[depth]);
      if (!(widest > largest_)) {
        if (depth == 0) return largest_;
        --depth;
        continue;
      }
      if (largest_ > best_so_far()) return largest_;
      // The most promising interval first: what it yields may rule others out.
      const int chosen = __ffs(__ballot_sync(kAllLanes, bound_[depth] == widest)) - 1;
      if (lane_ == chosen) bound_[depth] = -1.0;
      const int64_t left = left_[depth] + chosen * step_[depth];
      const int64_t right = min(left + step_[depth], right_[depth]);
      const double model_left = __shfl_sync(kAllLanes, model_left_[depth], chosen);
      if (right - left <= kDirectWidth) {
        evaluate_all(left, right);
      } else {
        ++depth;
        open(depth, left, right, model_left);
      }
    }
  }

 private:
  // One lane's reading for all: other warps write meanwhile, and the lanes must agree on the branch.
  __device__ double best_so_far() const {
    const double best = __longlong_as_double(static_cast<long long>(__ldcg(best_bits_)));
    return __shfl_sync(kAllLanes, best, 0);
  }

  __device__ void evaluate_all(int64_t left, int64_t right) {
    double largest = largest_;
    for (int64_t j = left + 1 + lane_; j <= right; j += kWarpSize) {
      largest = fmax(largest, fabs(subtract(tail_.model(j), tail_.empirical(j))));
    }
    largest_ = warp_max(largest);
  }

  // Cuts an interval in 32, a lane for each part.
  __device__ void open(int depth, int64_t left, int64_t right, double model_at_left) {
    const int64_t step = (right - left + kWarpSize - 1) / kWarpSize;
    const int64_t part_left = left + lane_ * step;
    const int64_t part_right = min(part_left + step, right);
    const bool active = part_left < right;
    double model_right = 0.0;
    double gap = 0.0;
    if (active) {
      model_right = tail_.model(part_right);
      gap = fabs(subtract(model_right, tail_.empirical(part_right)));
    }
    double model_left = __shfl_up_sync(kAllLanes, model_right, 1);
    if (lane_ == 0) model_left = model_at_left;
    left_[depth] = left;
    right_[depth] = right;
    step_[depth] = step;
    model_left_[depth] = model_left;
    bound_[depth] = active ? tail_.gap_bound_inside(part_left, model_left, part_right, model_right) : -1.0;
    largest_ = warp_max(fmax(largest_, gap));
  }

  const Tail tail_;
  const unsigned long long* const best_bits_;
  const int lane_;
  double largest_ = 0.0;  // the gap at j = first is zero
  int64_t left_[kMaxDepth];
  int64_t right_[kMaxDepth];
  int64_t step_[kMaxDepth];
  double model_left_[kMaxDepth];
  double bound_[kMaxDepth];
};

}  // namespace power_law
}  // namespace farms_fast
