// Power-law fit on the CPU.
//
// The exhaustive scan evaluates every j of every candidate i. This search returns the same bits
// from a small part of that work, for two reasons (see Tail in power_law_common.h):
//   within a candidate, an interval whose bound does not exceed the largest gap seen is settled;
//   across candidates, one whose largest gap seen exceeds the best D found is out.

#include "csrc/power_law.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "csrc/power_law_common.h"

namespace farms_fast {
namespace {

using power_law::CompensatedSum;
using power_law::IndexRange;
using power_law::LogHistogram;
using power_law::Tail;
using power_law::ValidRange;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Spectra from this length on get all threads one after the other; shorter ones share a thread.
constexpr int64_t kLongSpectrum = 1 << 14;
// A call with fewer values stays on the calling thread: waking others may take longer, on busy cores far longer.
constexpr int64_t kFewValues = 1 << 12;
constexpr int64_t kCoarseIntervals = 16;
constexpr int64_t kFirstLevelCandidates = 32;
constexpr int64_t kCandidatesPerTask = 64;
constexpr int64_t kLogsPerTask = 1 << 13;

template <class Body>
void for_range(bool parallel, int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (parallel) {
    torch::stable::parallel_for(begin, end, grain, body);
  } else if (begin < end) {
    body(begin, end);
  }
}

struct FitScratch {
  std::vector<double> logs;
  std::vector<double> excess;
  std::vector<int64_t> witness;  // per candidate: a j where its gap is large
};

// Evaluates the gaps of one tail, keeping the largest.
class CandidateSearch {
 public:
  CandidateSearch(const Tail& tail, double limit) : tail_(tail), limit_(limit) {}

  // Looks at one j first, because a neighbouring candidate had a large gap there.
  // Returns true once the candidate is out.
  bool probe(int64_t j) {
    if (j <= tail_.first || j > tail_.last) return false;
    model_and_record(j);
    return largest_ > limit_;
  }

  // D(first) exactly, or some value above the limit.
  double run() {
    const int64_t length = tail_.last - tail_.first;
    const int64_t step = std::max<int64_t>(1, (length + kCoarseIntervals - 1) / kCoarseIntervals);
    Interval coarse[kCoarseIntervals];
    int64_t n_coarse = 0;
    int64_t left = tail_.first;
    double model_left = 0.0;  // model(first) is exactly 1 - exp(0)
    while (left < tail_.last) {
      const int64_t right = std::min(left + step, tail_.last);
      const double model_right = model_and_record(right);
      if (largest_ > limit_) return largest_;
      coarse[n_coarse++] = make_interval(left, model_left, right, model_right);
      left = right;
      model_left = model_right;
    }
    // The most promising interval first: whatever it yields settles others.
    std::sort(coarse, coarse + n_coarse, [](const Interval& a, const Interval& b) { return a.bound > b.bound; });
    for (int64_t k = 0; k < n_coarse; ++k) {
      if (!(coarse[k].bound > largest_)) break;
      if (refine(coarse[k])) break;
    }
    return largest_;
  }

  int64_t witness() const { return witness_; }

 private:
  struct Interval {
    int64_t left;
    int64_t right;
    double model_left;
    double model_right;
    double bound;
  };

  double model_and_record(int64_t j) {
    const double model = tail_.model(j);
    const double gap = std::fabs(model - tail_.empirical(j));
    if (gap > largest_) {
      largest_ = gap;
      witness_ = j;
    }
    return model;
  }

  Interval make_interval(int64_t left, double model_left, int64_t right, double model_right) const {
    return {left, right, model_left, model_right, tail_.gap_bound_inside(left, model_left, right, model_right)};
  }

  // Halves an interval until nothing inside can exceed the largest gap. True when the candidate
  // is out.
  bool refine(const Interval& start) {
    Interval stack[66];  // each halving leaves one interval behind
    int depth = 0;
    stack[depth++] = start;
    while (depth > 0) {
      const Interval interval = stack[--depth];
      if (!(interval.bound > largest_)) continue;
      const int64_t middle = interval.left + (interval.right - interval.left) / 2;
      const double model_middle = model_and_record(middle);
      if (largest_ > limit_) return true;
      Interval lower = make_interval(interval.left, interval.model_left, middle, model_middle);
      Interval upper = make_interval(middle, model_middle, interval.right, interval.model_right);
      if (lower.bound > upper.bound) std::swap(lower, upper);
      if (lower.bound > largest_) stack[depth++] = lower;
      if (upper.bound > largest_) stack[depth++] = upper;
    }
    return false;
  }

  const Tail& tail_;
  const double limit_;
  double largest_ = 0.0;  // the gap at j = first is zero
  int64_t witness_ = -1;
};

struct Best {
  double distance = kInfinity;
  int64_t index = -1;

  void offer(double other_distance, int64_t other_index) {
    if (other_distance < distance || (other_distance == distance && other_index < index)) {
      distance = other_distance;
      index = other_index;
    }
  }
};

// First argmin of D over [range.begin, range.end), indices into `values` and the logs; without `split_equal` over the
// first of each value alone. Candidates are visited
// in levels of halving stride: the first levels find a D close to the best, and each later
// candidate has visited neighbours on both sides whose witnesses mostly refute it at once.
Best best_candidate(FitScratch& scratch, const double* values, int64_t size, const IndexRange& range, bool split_equal,
                    double least_spread, bool parallel) {
  Best best;
  const int64_t count = range.end - range.begin;
  if (count <= 0) return best;
  scratch.witness.assign(static_cast<size_t>(count), -1);
  int64_t first_stride = 1;
  while (first_stride * kFirstLevelCandidates < count) first_stride *= 2;
  std::mutex merge;
  for (int64_t stride = first_stride; stride > 0; stride /= 2) {
    const bool first_level = stride == first_stride;
    const int64_t start = first_level ? 0 : stride;
    const int64_t jump = first_level ? stride : 2 * stride;
    const int64_t in_level = start < count ? (count - start + jump - 1) / jump : 0;
    const Best before = best;
    for_range(parallel, 0, in_level, kCandidatesPerTask, [&](int64_t begin, int64_t end) {
      Best found = before;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t slot = start + k * jump;
        const int64_t candidate = range.begin + slot;
        if (!power_law::tail_spreads(scratch.logs.data(), candidate, size - 1, scratch.excess[candidate], least_spread))
          continue;
        if (!split_equal && !power_law::first_of_value(values, 0, candidate)) continue;
        const Tail tail = power_law::make_tail(scratch.logs.data(), candidate, size - 1, scratch.excess[candidate]);
        CandidateSearch search(tail, found.distance);
        const bool out = !first_level && (search.probe(scratch.witness[slot - stride]) ||
                                          (slot + stride < count && search.probe(scratch.witness[slot + stride])));
        if (!out) {
          const double distance = search.run();
          if (distance <= found.distance) found.offer(distance, candidate);
        }
        scratch.witness[slot] = search.witness();
      }
      const std::lock_guard<std::mutex> lock(merge);
      best.offer(found.distance, found.index);
    });
  }
  return best;
}

double modal_left_edge(const LogHistogram& histogram) {
  int64_t fullest = 0;
  int64_t most = -1;
  int64_t left = histogram.begin;
  for (int64_t bin = 0; bin < histogram.bins; ++bin) {
    const int64_t right = histogram.position(bin + 1);
    if (right - left > most) {
      most = right - left;
      fullest = bin;
    }
    left = right;
  }
  return histogram.edge(fullest);
}

// Fills logs and excess of `size` positive finite ascending values.
void prepare(const double* values, int64_t size, FitScratch& scratch, bool parallel) {
  scratch.logs.resize(static_cast<size_t>(size));
  scratch.excess.resize(static_cast<size_t>(size));
  double* const logs = scratch.logs.data();
  for_range(parallel, 0, size, kLogsPerTask, [=](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) logs[j] = std::log(values[j]);
  });
  CompensatedSum sum{0.0, 0.0};
  scratch.excess[size - 1] = 0.0;
  for (int64_t j = size - 2; j >= 0; --j) {
    logs[j] = power_law::ordered_log(logs[j], logs[j + 1]);
    sum.accumulate(power_law::excess_term(size - 1 - j, logs[j], logs[j + 1]));
    scratch.excess[j] = sum.rounded();
  }
}

void write_failure(const FitOutputs& outputs, int64_t s, FitStatus status) {
  outputs.alpha[s] = kNaN;
  outputs.distance[s] = kNaN;
  outputs.xmin[s] = kNaN;
  outputs.n_tail[s] = 0;
  outputs.status[s] = static_cast<int64_t>(status);
}

void fit_one(const double* evals, int64_t begin, int64_t end, double least_spread, int64_t s,
             const FitSettings& settings, const FitOutputs& outputs, FitScratch& scratch, bool parallel) {
  const ValidRange valid = power_law::valid_range(evals, begin, end);
  const double* const values = evals + valid.begin;
  const int64_t size = valid.end - valid.begin;
  outputs.dropped[s] = (end - begin) - size;
  if (size < 2) {
    const bool nonfinite = end > begin && !valid.any_finite;
    write_failure(outputs, s, nonfinite ? FitStatus::nonfinite : FitStatus::too_few);
    return;
  }
  IndexRange candidates{0, size - 1};
  if (settings.rule == XminRule::median) {
    int64_t index = power_law::median_index(size, settings.xmin_pos);
    if (index > size - 2) {
      write_failure(outputs, s, FitStatus::too_few);
      return;
    }
    if (!settings.published) index = std::lower_bound(values, values + index, values[index]) - values;
    candidates = {index, index + 1};
  } else if (settings.rule == XminRule::peak) {
    const LogHistogram histogram = power_law::log_histogram(values, 0, size, settings.bins);
    candidates = power_law::peak_candidates(values, 0, size, modal_left_edge(histogram), settings.published);
    if (candidates.begin >= candidates.end) {
      write_failure(outputs, s, FitStatus::no_candidate);
      return;
    }
  }
  prepare(values, size, scratch, parallel);
  const Best best = best_candidate(scratch, values, size, candidates, settings.published, least_spread, parallel);
  if (best.index < 0) {
    write_failure(outputs, s, FitStatus::degenerate_tail);
    return;
  }
  const int64_t n_tail = size - best.index;
  outputs.alpha[s] = power_law::tail_alpha(n_tail, scratch.excess[best.index]);
  outputs.distance[s] = best.distance;
  outputs.xmin[s] = values[best.index];
  outputs.n_tail[s] = n_tail;
  outputs.status[s] = static_cast<int64_t>(FitStatus::ok);
}

}  // namespace

void fit_power_law_cpu(const double* evals, const int64_t* offsets, const double* least_spread, int64_t n_spectra,
                       const FitSettings& settings, const FitOutputs& outputs) {
  const auto is_long = [=](int64_t s) { return offsets[s + 1] - offsets[s] >= kLongSpectrum; };
  const auto fit = [&](int64_t s, FitScratch& scratch, bool parallel) {
    const double least = least_spread == nullptr ? 0.0 : least_spread[s];
    fit_one(evals, offsets[s], offsets[s + 1], least, s, settings, outputs, scratch, parallel);
  };
  const bool few = offsets[n_spectra] - offsets[0] < kFewValues;
  torch::stable::parallel_for(0, n_spectra, few ? n_spectra : 1, [&](int64_t begin, int64_t end) {
    FitScratch scratch;
    for (int64_t s = begin; s < end; ++s) {
      if (is_long(s)) continue;
      fit(s, scratch, false);
    }
  });
  FitScratch scratch;
  for (int64_t s = 0; s < n_spectra; ++s) {
    if (!is_long(s)) continue;
    fit(s, scratch, true);
  }
}

}  // namespace farms_fast
