// Power-law fit of the tail of many spectra: launchers.

#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace farms_fast {

// How the first value of the tail, xmin, is chosen.
enum class XminRule : int { median = 0, ks = 1, peak = 2 };

enum class FitStatus : int64_t {
  ok = 0,
  too_few = 1,          // fewer than two values in the tail
  degenerate_tail = 2,  // the values of every tail are equal, or nearer to each other than the spectrum's least spread
  no_candidate = 3,     // no value lies in the range around the histogram's peak
  nonfinite = 4,        // there were values, none of them finite
};

struct FitSettings {
  XminRule rule;
  double xmin_pos;  // median: xmin is the value at int(N / xmin_pos); finite, above 1
  int64_t bins;     // peak: bins of the histogram of log10; at least 1
  // As in the published code: a tail may begin in the middle of equal values, and under peak the lower end of the
  // candidates is log10(0.95 x2). Otherwise a tail has all values from xmin on.
  bool published;
};

// One entry per spectrum each, written whole. alpha, distance and xmin are NaN and n_tail is 0
// unless the status is ok.
struct FitOutputs {
  double* alpha;     // (n_spectra)
  double* distance;  // (n_spectra) Kolmogorov-Smirnov distance D
  double* xmin;      // (n_spectra)
  int64_t* n_tail;   // (n_spectra) values from xmin up
  int64_t* status;   // (n_spectra) FitStatus
  int64_t* dropped;  // (n_spectra) values that are not positive and finite
};

// evals:        (total) float64, packed spectra, each ascending with NaN last
// offsets:      (n_spectra + 1) ascending; spectrum s is evals[offsets[s], offsets[s + 1])
// least_spread: (n_spectra), or null for zeros: no tail has ln(largest / xmin) of this or less
// Uses torch's threads. The result depends neither on their number nor on timing.
void fit_power_law_cpu(const double* evals, const int64_t* offsets, const double* least_spread, int64_t n_spectra,
                       const FitSettings& settings, const FitOutputs& outputs);

// Bytes of device memory that fit_power_law_cuda needs, for `total` values in `n_spectra` spectra.
size_t fit_power_law_cuda_workspace_bytes(int64_t total, int64_t n_spectra);

// The same on the device. All pointers are device pointers; `total` is the length of evals;
// `workspace` is aligned to 256 bytes and need not be initialised. Everything runs on `stream`,
// the host never waits, and the launches can be captured in a graph.
// Returns the first cudaError_t of the launches (0 when all were accepted).
int fit_power_law_cuda(const double* evals, const int64_t* offsets, const double* least_spread, int64_t total,
                       int64_t n_spectra, const FitSettings& settings, const FitOutputs& outputs, void* workspace,
                       CUstream_st* stream);

}  // namespace farms_fast
