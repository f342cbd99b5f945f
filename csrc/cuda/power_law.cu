// Power-law fit on the device: many spectra of any lengths in one series of launches.
//
// The host knows the total length and the number of spectra, nothing else, so every launch is sized
// by those two and finds its spectrum on the device. The search is that of the CPU (see
// cpu/power_law.cpp) with a warp for each candidate: 32 sampled points bound D from below, 32
// intervals bound what lies between them from above, and only intervals that could hold a larger gap
// are opened. Candidates run in four levels of falling stride, so that the first ones leave a D near
// the best to compare the rest with. Timing decides how much work is skipped, never what is chosen:
// the best D only falls, and a candidate is dropped only on a gap strictly above it.

#include "../power_law.h"

#include <cuda_runtime.h>

#include "../power_law_common.h"
#include "power_law_search.cuh"

namespace farms_fast {
namespace {

using power_law::CompensatedSum;
using power_law::DistanceSearch;
using power_law::IndexRange;
using power_law::kFullMask;
using power_law::kWarp;
using power_law::lane_id;
using power_law::LogHistogram;
using power_law::ValidRange;
using power_law::warp_max;

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kScanThreads = 512;
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int kScanItems = 4;
constexpr int kScanTile = kScanThreads * kScanItems;

// At stride 1 a warp looks at this many neighbours: most are settled by 32 samples.
constexpr int kGroup = 8;
constexpr int64_t kStrides[] = {4096, 256, 16, 1};

constexpr unsigned long long kInfinityBits = 0x7ff0000000000000ull;
constexpr unsigned long long kNoIndex = ~0ull;

struct SpectrumState {
  int64_t begin;  // values that enter the fit, as indices into evals
  int64_t end;
  int64_t candidates_begin;
  int64_t candidates_end;
  unsigned long long best_bits;   // of D; distances are not negative, so bits order as values do
  unsigned long long best_index;  // lowest index with that D
  int64_t failure;                // FitStatus when known before the search, ok otherwise
};

struct Workspace {
  SpectrumState* states;  // (n_spectra)
  double* logs;           // (total)
  double* excess;         // (total)
  double* distances;      // (total) of candidates; a lower bound above the best where dropped
  int32_t* owner;         // (total) spectrum of each value, -1 where there is none
};

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

Workspace carve(void* memory, int64_t total, int64_t n_spectra, size_t* bytes) {
  size_t used = 0;
  char* const base = static_cast<char*>(memory);
  const auto take = [&](size_t count, size_t width) {
    char* const here = base + used;
    used += aligned(count * width);
    return static_cast<void*>(here);
  };
  const size_t n = static_cast<size_t>(total);
  Workspace workspace;
  workspace.states = static_cast<SpectrumState*>(take(static_cast<size_t>(n_spectra), sizeof(SpectrumState)));
  workspace.logs = static_cast<double*>(take(n, sizeof(double)));
  workspace.excess = static_cast<double*>(take(n, sizeof(double)));
  workspace.distances = static_cast<double*>(take(n, sizeof(double)));
  workspace.owner = static_cast<int32_t*>(take(n, sizeof(int32_t)));
  if (bytes != nullptr) *bytes = used;
  return workspace;
}

// Spectrum s as indices into evals. Offsets live on the device, where the host cannot check them
// without waiting: wrong ones may give wrong fits, never an access outside evals.
__device__ __forceinline__ IndexRange spectrum_range(const int64_t* offsets, int64_t s, int64_t total) {
  IndexRange range;
  range.begin = min(max(offsets[s], int64_t{0}), total);
  range.end = min(max(offsets[s + 1], range.begin), total);
  return range;
}

__device__ __forceinline__ int64_t warp_id() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

// Left edge of the fullest bin, the first of equals. Bins are dealt out to the lanes.
__device__ double modal_left_edge(const LogHistogram& histogram) {
  int64_t most = -1;
  int64_t fullest = 0;
  for (int64_t bin = lane_id(); bin < histogram.bins; bin += kWarp) {
    const int64_t count = histogram.position(bin + 1) - histogram.position(bin);
    if (count > most) {
      most = count;
      fullest = bin;
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int64_t other_most = __shfl_xor_sync(kFullMask, most, offset);
    const int64_t other_bin = __shfl_xor_sync(kFullMask, fullest, offset);
    if (other_most > most || (other_most == most && other_bin < fullest)) {
      most = other_most;
      fullest = other_bin;
    }
  }
  return histogram.edge(fullest);
}

// A warp for each spectrum: what enters the fit, and which candidates.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const double* __restrict__ evals, const int64_t* __restrict__ offsets, int64_t total,
                   int64_t n_spectra, FitSettings settings, SpectrumState* __restrict__ states,
                   int64_t* __restrict__ dropped) {
  const int64_t s = warp_id();
  if (s >= n_spectra) return;
  const IndexRange given = spectrum_range(offsets, s, total);
  const ValidRange valid = power_law::valid_range(evals, given.begin, given.end);
  const int64_t size = valid.end - valid.begin;
  FitStatus failure = FitStatus::ok;
  IndexRange candidates{valid.begin, valid.begin};
  if (size < 2) {
    failure = given.end > given.begin && !valid.any_finite ? FitStatus::nonfinite : FitStatus::too_few;
  } else if (settings.rule == XminRule::median) {
    const int64_t index = power_law::median_index(size, settings.xmin_pos);
    if (index > size - 2) {
      failure = FitStatus::too_few;
    } else {
      candidates.begin = valid.begin + index;
      candidates.end = candidates.begin + 1;
    }
  } else if (settings.rule == XminRule::ks) {
    candidates.end = valid.end - 1;
  } else {
    const LogHistogram histogram = power_law::log_histogram(evals, valid.begin, valid.end, settings.bins);
    candidates = power_law::peak_candidates(evals, valid.begin, valid.end, modal_left_edge(histogram),
                                            settings.log10_lower_bound);
    if (candidates.begin >= candidates.end) failure = FitStatus::no_candidate;
  }
  if (lane_id() != 0) return;
  SpectrumState state;
  state.begin = valid.begin;
  state.end = valid.end;
  state.candidates_begin = candidates.begin;
  state.candidates_end = candidates.end;
  state.best_bits = kInfinityBits;
  state.best_index = kNoIndex;
  state.failure = static_cast<int64_t>(failure);
  states[s] = state;
  dropped[s] = (given.end - given.begin) - size;
}

__global__ void __launch_bounds__(kThreads) logs_kernel(const double* __restrict__ evals, int64_t total,
                                                        double* __restrict__ logs, int32_t* __restrict__ owner) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= total) return;
  const double value = evals[j];
  logs[j] = power_law::enters_fit(value) ? log(value) : 0.0;
  owner[j] = -1;
}

__device__ __forceinline__ CompensatedSum shuffle_up(const CompensatedSum& sum, int offset) {
  return {__shfl_up_sync(kFullMask, sum.value, offset), __shfl_up_sync(kFullMask, sum.error, offset)};
}

// A block for each spectrum walks tiles from the largest value down, with two scans in each: the
// smallest logarithm so far (ordered_log) and the sum of excess_term. The order of additions depends
// only on the distance from the top, so a spectrum gives the same bits alone and packed.
__global__ void __launch_bounds__(kScanThreads)
    excess_kernel(const int64_t* __restrict__ offsets, int64_t total, int64_t n_spectra,
                  const SpectrumState* __restrict__ states, double* __restrict__ logs, double* __restrict__ excess,
                  int32_t* __restrict__ owner) {
  __shared__ double warp_logs[kScanWarps];
  __shared__ CompensatedSum warp_sums[kScanWarps];
  const int lane = lane_id();
  const int warp = threadIdx.x / kWarp;
  for (int64_t s = blockIdx.x; s < n_spectra; s += gridDim.x) {
    const IndexRange given = spectrum_range(offsets, s, total);
    for (int64_t j = given.begin + threadIdx.x; j < given.end; j += kScanThreads) {
      owner[j] = static_cast<int32_t>(s);
    }
    const int64_t top = states[s].end - 1;
    const int64_t size = states[s].end - states[s].begin;
    double carried_log = INFINITY;
    CompensatedSum carried{0.0, 0.0};
    for (int64_t tile = 0; tile < size; tile += kScanTile) {
      // Depth d counts down from the top: value top - d has d values above it.
      const int64_t depth = tile + static_cast<int64_t>(threadIdx.x) * kScanItems;
      double here[kScanItems];
      double smallest = INFINITY;
#pragma unroll
      for (int k = 0; k < kScanItems; ++k) {
        here[k] = depth + k < size ? logs[top - depth - k] : INFINITY;
        smallest = power_law::ordered_log(here[k], smallest);
        here[k] = smallest;
      }
      double scanned = smallest;
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = __shfl_up_sync(kFullMask, scanned, offset);
        if (lane >= offset) scanned = power_law::ordered_log(other, scanned);
      }
      if (lane == kWarp - 1) warp_logs[warp] = scanned;
      __syncthreads();
      double next = __shfl_up_sync(kFullMask, scanned, 1);
      if (lane == 0) next = INFINITY;
      double tile_log = carried_log;
      for (int w = 0; w < kScanWarps; ++w) {
        if (w == warp) next = power_law::ordered_log(next, tile_log);
        tile_log = power_law::ordered_log(warp_logs[w], tile_log);
      }
      carried_log = tile_log;

      CompensatedSum sum{0.0, 0.0};
      CompensatedSum partial[kScanItems];
#pragma unroll
      for (int k = 0; k < kScanItems; ++k) {
        here[k] = power_law::ordered_log(here[k], next);
        if (depth + k < size) {
          if (depth + k > 0) sum.accumulate(power_law::excess_term(depth + k, here[k], next));
          logs[top - depth - k] = here[k];
        }
        partial[k] = sum;
        next = here[k];
      }
      CompensatedSum scanned_sum = sum;
      for (int offset = 1; offset < kWarp; offset *= 2) {
        CompensatedSum other = shuffle_up(scanned_sum, offset);
        if (lane >= offset) {
          other.accumulate(scanned_sum);
          scanned_sum = other;
        }
      }
      if (lane == kWarp - 1) warp_sums[warp] = scanned_sum;
      CompensatedSum before = shuffle_up(scanned_sum, 1);
      if (lane == 0) before = CompensatedSum{0.0, 0.0};
      __syncthreads();
      for (int w = 0; w < kScanWarps; ++w) {
        if (w == warp) {
          CompensatedSum from_top = carried;
          from_top.accumulate(before);
          before = from_top;
        }
        carried.accumulate(warp_sums[w]);
      }
#pragma unroll
      for (int k = 0; k < kScanItems; ++k) {
        if (depth + k < size) {
          CompensatedSum from_top = before;
          from_top.accumulate(partial[k]);
          excess[top - depth - k] = from_top.rounded();
        }
      }
      __syncthreads();
    }
  }
}

__device__ void evaluate_candidate(int64_t candidate, SpectrumState* state, const double* logs, const double* excess,
                                   double* distances) {
  double distance = INFINITY;
  const double candidate_excess = excess[candidate];
  if (candidate_excess > 0.0) {
    const power_law::Tail tail = power_law::make_tail(logs, candidate, state->end - 1, candidate_excess);
    distance = DistanceSearch(tail, &state->best_bits).run();
    if (lane_id() == 0) {
      const auto bits = static_cast<unsigned long long>(__double_as_longlong(distance));
      if (bits < __ldcg(&state->best_bits)) atomicMin(&state->best_bits, bits);
    }
  }
  if (lane_id() == 0) distances[candidate] = distance;
}

// Candidates at multiples of `stride` that are no multiples of `done_stride`, `group` to a warp.
__global__ void __launch_bounds__(kThreads)
    search_kernel(int64_t total, int64_t stride, int64_t done_stride, int group, const int32_t* __restrict__ owner,
                  const double* __restrict__ logs, const double* __restrict__ excess, SpectrumState* states,
                  double* __restrict__ distances) {
  const int lane = lane_id();
  const int64_t mine = (warp_id() * group + lane) * stride;
  bool live = lane < group && mine < total && (done_stride == 0 || mine % done_stride != 0);
  int32_t spectrum = 0;
  if (live) {
    spectrum = owner[mine];
    live = spectrum >= 0 && mine >= states[spectrum].candidates_begin && mine < states[spectrum].candidates_end;
  }
  unsigned waiting = __ballot_sync(kFullMask, live);
  while (waiting != 0) {
    const int next = __ffs(waiting) - 1;
    waiting &= waiting - 1;
    evaluate_candidate(__shfl_sync(kFullMask, mine, next), states + __shfl_sync(kFullMask, spectrum, next), logs,
                       excess, distances);
  }
}

// The one candidate of each spectrum under the median rule.
__global__ void __launch_bounds__(kThreads)
    median_kernel(int64_t n_spectra, const double* __restrict__ logs, const double* __restrict__ excess,
                  SpectrumState* states, double* __restrict__ distances) {
  const int64_t s = warp_id();
  if (s >= n_spectra || states[s].candidates_begin >= states[s].candidates_end) return;
  const int64_t candidate = states[s].candidates_begin;
  evaluate_candidate(candidate, states + s, logs, excess, distances);
  if (lane_id() == 0 && excess[candidate] > 0.0) {
    states[s].best_index = static_cast<unsigned long long>(candidate);
  }
}

// Lowest index among the candidates that reach the best D.
__global__ void __launch_bounds__(kThreads) select_kernel(int64_t total, const int32_t* __restrict__ owner,
                                                          const double* __restrict__ distances, SpectrumState* states) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= total) return;
  if (owner[j] < 0) return;
  SpectrumState* const state = states + owner[j];
  if (j < state->candidates_begin || j >= state->candidates_end) return;
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(distances[j]));
  if (bits == state->best_bits && bits != kInfinityBits) {
    atomicMin(&state->best_index, static_cast<unsigned long long>(j));
  }
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* __restrict__ evals, int64_t n_spectra, const SpectrumState* __restrict__ states,
                  const double* __restrict__ excess, FitOutputs outputs) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= n_spectra) return;
  const SpectrumState state = states[s];
  int64_t status = state.failure;
  if (status == static_cast<int64_t>(FitStatus::ok) && state.best_index == kNoIndex) {
    status = static_cast<int64_t>(FitStatus::degenerate_tail);
  }
  const bool ok = status == static_cast<int64_t>(FitStatus::ok);
  const int64_t index = ok ? static_cast<int64_t>(state.best_index) : 0;
  const int64_t n_tail = ok ? state.end - index : 0;
  outputs.alpha[s] = ok ? power_law::tail_alpha(n_tail, excess[index]) : NAN;
  outputs.distance[s] = ok ? __longlong_as_double(static_cast<long long>(state.best_bits)) : NAN;
  outputs.xmin[s] = ok ? evals[index] : NAN;
  outputs.n_tail[s] = n_tail;
  outputs.status[s] = status;
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace

size_t fit_power_law_cuda_workspace_bytes(int64_t total, int64_t n_spectra) {
  size_t bytes = 0;
  carve(nullptr, total, n_spectra, &bytes);
  return bytes;
}

int fit_power_law_cuda(const double* evals, const int64_t* offsets, int64_t total, int64_t n_spectra,
                       const FitSettings& settings, const FitOutputs& outputs, void* workspace, CUstream_st* stream) {
  if (n_spectra == 0) return static_cast<int>(cudaSuccess);
  const Workspace work = carve(workspace, total, n_spectra, nullptr);
  const unsigned spectrum_warps = blocks_for(n_spectra, kWarpsPerBlock);
  prepare_kernel<<<spectrum_warps, kThreads, 0, stream>>>(evals, offsets, total, n_spectra, settings, work.states,
                                                          outputs.dropped);
  if (total > 0) {
    const unsigned value_threads = blocks_for(total, kThreads);
    logs_kernel<<<value_threads, kThreads, 0, stream>>>(evals, total, work.logs, work.owner);
    const unsigned scan_blocks = static_cast<unsigned>(n_spectra < (1 << 20) ? n_spectra : 1 << 20);
    excess_kernel<<<scan_blocks, kScanThreads, 0, stream>>>(offsets, total, n_spectra, work.states, work.logs,
                                                            work.excess, work.owner);
    if (settings.rule == XminRule::median) {
      median_kernel<<<spectrum_warps, kThreads, 0, stream>>>(n_spectra, work.logs, work.excess, work.states,
                                                             work.distances);
    } else {
      int64_t done_stride = 0;
      for (const int64_t stride : kStrides) {
        const int group = stride == 1 ? kGroup : 1;
        const int64_t positions = (total + stride - 1) / stride;
        search_kernel<<<blocks_for(positions, kWarpsPerBlock * group), kThreads, 0, stream>>>(
            total, stride, done_stride, group, work.owner, work.logs, work.excess, work.states, work.distances);
        done_stride = stride;
      }
      select_kernel<<<value_threads, kThreads, 0, stream>>>(total, work.owner, work.distances, work.states);
    }
  }
  finish_kernel<<<blocks_for(n_spectra, kThreads), kThreads, 0, stream>>>(evals, n_spectra, work.states, work.excess,
                                                                          outputs);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace farms_fast
