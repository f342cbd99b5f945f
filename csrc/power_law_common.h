// Arithmetic of the power-law fit that the host and the device share.
//
// Every quantity that decides which candidate wins is computed here and nowhere else, one rounding
// at a time: a bound from a few sampled points is only a bound if the full scan would compute the
// very same bits at those points.

#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/host_device.h"

namespace farms_fast {
namespace power_law {

// Single roundings that no compiler may contract into a fused multiply-add. On the host the build
// sets -ffp-contract=off for the same purpose.
FARMS_FAST_HOST_DEVICE double add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

FARMS_FAST_HOST_DEVICE double subtract(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dsub_rn(a, b);
#else
  return a - b;
#endif
}

FARMS_FAST_HOST_DEVICE double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

constexpr double kLargestFinite = 1.7976931348623157e308;

// A value that may enter a fit. NaN fails both comparisons.
FARMS_FAST_HOST_DEVICE bool enters_fit(double value) { return value > 0.0 && value <= kLargestFinite; }

// First index in [begin, end) from which `reached` holds, `end` if it never does. `reached` must
// not go back to false along the range.
template <class Reached>
FARMS_FAST_HOST_DEVICE int64_t partition_index(int64_t begin, int64_t end, const Reached& reached) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (reached(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// Where the values that enter a fit lie in one ascending spectrum (NaN last).
struct ValidRange {
  int64_t begin;
  int64_t end;
  bool any_finite;  // zeros and negative values count as finite
};

FARMS_FAST_HOST_DEVICE ValidRange valid_range(const double* evals, int64_t begin, int64_t end) {
  ValidRange range;
  range.begin = partition_index(begin, end, [=](int64_t j) { return !(evals[j] <= 0.0); });
  range.end = partition_index(range.begin, end, [=](int64_t j) { return !(evals[j] <= kLargestFinite); });
  // The largest value that is not +inf or NaN sits just before range.end; only -inf can be left.
  range.any_finite = range.end > begin && evals[range.end - 1] >= -kLargestFinite;
  return range;
}

// excess(i) = sum_{j >= i} (ln l_j - ln l_i), written as the running sum of
// (N - 1 - i) (ln l_{i+1} - ln l_i) from the top. No term is negative, so nothing cancels, whatever
// the scale of the spectrum; the textbook form sum ln l_j - n ln l_i loses digits to n ln l_i.
// alpha(i) = 1 + n / excess(i).
FARMS_FAST_HOST_DEVICE double excess_term(int64_t above, double log_here, double log_next) {
  return multiply(static_cast<double>(above), subtract(log_next, log_here));
}

// A sum carried as value + error, by the two-sum of Knuth: 450,000 terms end within an ulp of exact.
struct CompensatedSum {
  double value;
  double error;

  FARMS_FAST_HOST_DEVICE void accumulate(double term) {
    const double sum = add(value, term);
    const double shadow = subtract(sum, value);
    error = add(error, add(subtract(value, subtract(sum, shadow)), subtract(term, shadow)));
    value = sum;
  }
  FARMS_FAST_HOST_DEVICE void accumulate(const CompensatedSum& other) {
    accumulate(other.value);
    error = add(error, other.error);
  }
  FARMS_FAST_HOST_DEVICE double rounded() const { return add(value, error); }
};

// ln l_j, never above ln l_{j+1}. A library's logarithm may return two close values out of order by
// an ulp; where alpha is large (a spectrum of nearly equal values) that ulp would matter.
FARMS_FAST_HOST_DEVICE double ordered_log(double log_here, double log_next) {
  return log_here < log_next ? log_here : log_next;
}

// Logs enter in order (see ordered_log), and rounding keeps the order through the difference, the
// product with slope and the division by n. What can break it is exp, a few ulps of a value below
// one, and the subtractions after it: together under 2e-15. The margin is far above that; too large
// a margin costs evaluations only, never exactness.
constexpr double kGapMargin = 1e-12;

// The tail that starts at candidate `first` of a spectrum whose last index is `last`.
//   model(j)     = 1 - (l_j / l_first)^(1 - alpha) = 1 - exp((1 - alpha) (ln l_j - ln l_first))
//   empirical(j) = (j - first) / n
//   gap(j)       = |model(j) - empirical(j)|,   D(first) = max_j gap(j)
struct Tail {
  const double* logs;
  int64_t first;
  int64_t last;
  double count;
  double log_first;
  double slope;  // 1 - alpha

  FARMS_FAST_HOST_DEVICE double model(int64_t j) const {
    return subtract(1.0, exp(multiply(slope, subtract(logs[j], log_first))));
  }
  FARMS_FAST_HOST_DEVICE double empirical(int64_t j) const { return static_cast<double>(j - first) / count; }
  // Both distribution functions grow with j, so strictly inside (left, right) the gap is at most
  // model(right) - empirical(left + 1) or empirical(right - 1) - model(left).
  FARMS_FAST_HOST_DEVICE double gap_bound_inside(int64_t left, double model_left, int64_t right,
                                                 double model_right) const {
    if (right - left < 2) return -1.0;
    const double above = model_right - empirical(left + 1);
    const double below = empirical(right - 1) - model_left;
    return (above > below ? above : below) + kGapMargin;
  }
};

FARMS_FAST_HOST_DEVICE double tail_alpha(int64_t count, double excess) {
  return add(1.0, static_cast<double>(count) / excess);
}

FARMS_FAST_HOST_DEVICE Tail make_tail(const double* logs, int64_t first, int64_t last, double excess) {
  Tail tail;
  tail.logs = logs;
  tail.first = first;
  tail.last = last;
  tail.count = static_cast<double>(last - first + 1);
  tail.log_first = logs[first];
  tail.slope = subtract(1.0, tail_alpha(last - first + 1, excess));
  return tail;
}

// Whether the tail from an index on can have an exponent: its values differ, by more than the least spread.
FARMS_FAST_HOST_DEVICE bool tail_spreads(const double* logs, int64_t first, int64_t last, double excess,
                                         double least_spread) {
  return excess > 0.0 && subtract(logs[last], logs[first]) > least_spread;
}

// Whether an index of a spectrum that begins at `begin` is the first of its value.
FARMS_FAST_HOST_DEVICE bool first_of_value(const double* evals, int64_t begin, int64_t index) {
  return index == begin || evals[index - 1] < evals[index];
}

// Index of xmin for xmin_pos, relative to the valid range: int(N / xmin_pos).
FARMS_FAST_HOST_DEVICE int64_t median_index(int64_t size, double xmin_pos) {
  return static_cast<int64_t>(static_cast<double>(size) / xmin_pos);
}

// numpy.histogram's edges for log10 of the values; the values are sorted, so counts are
// differences of positions, and no value but those a binary search touches needs a log10.
struct LogHistogram {
  const double* evals;
  int64_t begin;
  int64_t end;
  int64_t bins;
  double low;
  double high;
  double step;

  FARMS_FAST_HOST_DEVICE double edge(int64_t bin) const {
    return bin == bins ? high : add(multiply(static_cast<double>(bin), step), low);
  }
  FARMS_FAST_HOST_DEVICE int64_t position(int64_t bin) const {
    if (bin <= 0) return begin;
    if (bin >= bins) return end;  // the last bin is closed
    const double limit = edge(bin);
    const double* const values = evals;
    return partition_index(begin, end, [=](int64_t j) { return log10(values[j]) >= limit; });
  }
};

FARMS_FAST_HOST_DEVICE LogHistogram log_histogram(const double* evals, int64_t begin, int64_t end, int64_t bins) {
  LogHistogram histogram;
  histogram.evals = evals;
  histogram.begin = begin;
  histogram.end = end;
  histogram.bins = bins;
  histogram.low = log10(evals[begin]);
  histogram.high = log10(evals[end - 1]);
  if (histogram.low == histogram.high) {
    histogram.low = subtract(histogram.low, 0.5);
    histogram.high = add(histogram.high, 0.5);
  }
  histogram.step = subtract(histogram.high, histogram.low) / static_cast<double>(bins);
  return histogram;
}

struct IndexRange {
  int64_t begin;
  int64_t end;
};

// Candidates within 0.95 x2 <= l_i <= 1.5 x2 that leave at least two values in the tail, where x2
// is ten to the left edge of the fullest bin. The published code compares against
// log10(0.95 x2) at the lower end; log10_lower_bound repeats that.
FARMS_FAST_HOST_DEVICE IndexRange peak_candidates(const double* evals, int64_t begin, int64_t end, double left_edge,
                                                  bool log10_lower_bound) {
  const double peak = pow(10.0, left_edge);
  double lower = multiply(0.95, peak);
  if (log10_lower_bound) lower = log10(lower);
  const double upper = multiply(1.5, peak);
  IndexRange range;
  range.begin = partition_index(begin, end, [=](int64_t j) { return evals[j] >= lower; });
  range.end = partition_index(range.begin, end, [=](int64_t j) { return evals[j] > upper; });
  if (range.end > end - 1) range.end = end - 1;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

}  // namespace power_law
}  // namespace farms_fast
