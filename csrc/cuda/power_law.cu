// Power-law fit on the device: many spectra of any lengths in one series of launches.
//
// The host knows the total length and the number of spectra, nothing else, so every launch is sized
// by those two and finds its spectrum on the device. The search is that of the CPU (see
// cpu/power_law.cpp) with a warp for each candidate: 32 sampled points bound D from below, 32
// intervals bound what lies between them from above, and only intervals that could hold a larger gap
// are opened. Candidates run in four levels of falling stride, so that the first ones leave a D near
// the best to compare the rest with. Timing decides how much work is skipped, never what is chosen:
// the best D only falls, and a candidate is dropped only on a gap strictly above it.
//
// Shapes, in all kernels: evals, logs, excess, distances, owner (total,); offsets (n_spectra + 1,); least_spread,
// states, dropped and each of the outputs (n_spectra,). One launch needs all of the one before it;
// inside of a launch nobody waits for another block, and best_bits and best_index change by atomic
// minima alone, so the order of warps does not matter.

#include "csrc/power_law.h"

#include <cuda_runtime.h>

#include "csrc/cuda/power_law_scan.cuh"
#include "csrc/cuda/power_law_search.cuh"
#include "csrc/power_law_common.h"

namespace farms_fast {
namespace {

using power_law::ChunkSummary;
using power_law::IndexRange;
using power_law::kScanChunk;
using power_law::LogHistogram;
using power_law::ScanPass;
using power_law::SpectrumState;
using power_law::ValidRange;
using power_law::WarpDistanceSearch;

constexpr int kFitThreads = 256;
constexpr int kWarpsPerBlock = kFitThreads / kWarpSize;

// At stride 1 a warp looks at this many neighbours: 32 samples rule most of them out.
constexpr int kNeighbours = 8;
constexpr int64_t kStrides[] = {4096, 256, 16, 1};

constexpr unsigned long long kInfinityBits = 0x7ff0000000000000ull;
constexpr unsigned long long kNoIndex = ~0ull;

struct FitWorkspace {
  SpectrumState* states;  // (n_spectra)
  double* logs;           // (total)
  double* excess;         // (total)
  double* distances;      // (total) of candidates; a lower bound above the best where dropped
  int32_t* owner;         // (total) spectrum of each value, -1 where there is none
  ChunkSummary* chunks;   // (2 a slot, see power_law_scan.cuh)
};

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

FitWorkspace carve(void* memory, int64_t total, int64_t n_spectra, size_t* bytes) {
  size_t used = 0;
  char* const base = static_cast<char*>(memory);
  const auto take = [&](size_t count, size_t width) {
    char* const here = base + used;
    used += aligned(count * width);
    return static_cast<void*>(here);
  };
  const size_t n = static_cast<size_t>(total);
  FitWorkspace workspace;
  workspace.states = static_cast<SpectrumState*>(take(static_cast<size_t>(n_spectra), sizeof(SpectrumState)));
  workspace.logs = static_cast<double*>(take(n, sizeof(double)));
  workspace.excess = static_cast<double*>(take(n, sizeof(double)));
  workspace.distances = static_cast<double*>(take(n, sizeof(double)));
  workspace.owner = static_cast<int32_t*>(take(n, sizeof(int32_t)));
  workspace.chunks = static_cast<ChunkSummary*>(take(2 * (n / kScanChunk + 1), sizeof(ChunkSummary)));
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
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
}

// Left edge of the fullest bin, the first of equals. Bins are dealt out to the lanes.
__device__ double modal_left_edge(const LogHistogram& histogram) {
  int64_t most = -1;
  int64_t fullest = 0;
  for (int64_t bin = lane_id(); bin < histogram.bins; bin += kWarpSize) {
    const int64_t count = histogram.position(bin + 1) - histogram.position(bin);
    if (count > most) {
      most = count;
      fullest = bin;
    }
  }
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const int64_t other_most = __shfl_xor_sync(kAllLanes, most, offset);
    const int64_t other_bin = __shfl_xor_sync(kAllLanes, fullest, offset);
    if (other_most > most || (other_most == most && other_bin < fullest)) {
      most = other_most;
      fullest = other_bin;
    }
  }
  return histogram.edge(fullest);
}

// grid: (a warp for each spectrum). What enters the fit, and which candidates.
__global__ void __launch_bounds__(kFitThreads)
    prepare_kernel(const double* __restrict__ evals, const int64_t* __restrict__ offsets,
                   const double* __restrict__ least_spread, int64_t total, int64_t n_spectra, FitSettings settings,
                   SpectrumState* __restrict__ states, int64_t* __restrict__ dropped) {
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
      if (!settings.published) {
        const double xmin = evals[candidates.begin];
        candidates.begin =
            power_law::partition_index(valid.begin, candidates.begin, [=](int64_t j) { return evals[j] >= xmin; });
      }
      candidates.end = candidates.begin + 1;
    }
  } else if (settings.rule == XminRule::ks) {
    candidates.end = valid.end - 1;
  } else {
    const LogHistogram histogram = power_law::log_histogram(evals, valid.begin, valid.end, settings.bins);
    candidates =
        power_law::peak_candidates(evals, valid.begin, valid.end, modal_left_edge(histogram), settings.published);
    if (candidates.begin >= candidates.end) failure = FitStatus::no_candidate;
  }
  if (lane_id() != 0) return;
  SpectrumState state;
  state.begin = valid.begin;
  state.end = valid.end;
  state.candidates_begin = candidates.begin;
  state.candidates_end = candidates.end;
  state.least_spread = least_spread == nullptr ? 0.0 : least_spread[s];
  state.best_bits = kInfinityBits;
  state.best_index = kNoIndex;
  state.failure = static_cast<int64_t>(failure);
  states[s] = state;
  dropped[s] = (given.end - given.begin) - size;
}

// grid: (a thread for each value). Logarithms, and the spectrum that each value belongs to.
__global__ void __launch_bounds__(kFitThreads)
    logs_kernel(const double* __restrict__ evals, const int64_t* __restrict__ offsets, int64_t total, int64_t n_spectra,
                double* __restrict__ logs, int32_t* __restrict__ owner) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= total) return;
  const double value = evals[j];
  logs[j] = power_law::enters_fit(value) ? log(value) : 0.0;
  // The last spectrum that begins at or before j: of those that begin there, the one that is not empty.
  int64_t low = 0, high = n_spectra;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] <= j)
      low = middle + 1;
    else
      high = middle;
  }
  const IndexRange range = spectrum_range(offsets, low > 0 ? low - 1 : 0, total);
  owner[j] = low > 0 && j < range.end ? static_cast<int32_t>(low - 1) : -1;
}

__device__ void evaluate_candidate(int64_t candidate, SpectrumState* state, const double* logs, const double* excess,
                                   double* distances) {
  double distance = INFINITY;
  const double candidate_excess = excess[candidate];
  if (power_law::tail_spreads(logs, candidate, state->end - 1, candidate_excess, state->least_spread)) {
    const power_law::Tail tail = power_law::make_tail(logs, candidate, state->end - 1, candidate_excess);
    distance = WarpDistanceSearch(tail, &state->best_bits).run();
    if (lane_id() == 0) {
      const auto bits = static_cast<unsigned long long>(__double_as_longlong(distance));
      if (bits < __ldcg(&state->best_bits)) atomicMin(&state->best_bits, bits);
    }
  }
  if (lane_id() == 0) distances[candidate] = distance;
}

// grid: (a warp for each `group` multiples of `stride`). Candidates there that are no multiples of `done_stride`.
// Without `split_equal` only the first of each value is one; the others have an infinite distance.
__global__ void __launch_bounds__(kFitThreads)
    search_kernel(int64_t total, int64_t stride, int64_t done_stride, int group, bool split_equal,
                  const double* __restrict__ evals, const int32_t* __restrict__ owner, const double* __restrict__ logs,
                  const double* __restrict__ excess, SpectrumState* states, double* __restrict__ distances) {
  const int lane = lane_id();
  const int64_t mine = (warp_id() * group + lane) * stride;
  bool live = lane < group && mine < total && (done_stride == 0 || mine % done_stride != 0);
  int32_t spectrum = 0;
  if (live) {
    spectrum = owner[mine];
    live = spectrum >= 0 && mine >= states[spectrum].candidates_begin && mine < states[spectrum].candidates_end;
  }
  if (live && !split_equal && !power_law::first_of_value(evals, states[spectrum].begin, mine)) {
    distances[mine] = INFINITY;
    live = false;
  }
  unsigned waiting = __ballot_sync(kAllLanes, live);
  while (waiting != 0) {
    const int next = __ffs(waiting) - 1;
    waiting &= waiting - 1;
    evaluate_candidate(__shfl_sync(kAllLanes, mine, next), states + __shfl_sync(kAllLanes, spectrum, next), logs,
                       excess, distances);
  }
}

// grid: (a warp for each spectrum). The one candidate of each under the median rule.
__global__ void __launch_bounds__(kFitThreads)
    median_kernel(int64_t n_spectra, const double* __restrict__ logs, const double* __restrict__ excess,
                  SpectrumState* states, double* __restrict__ distances) {
  const int64_t s = warp_id();
  if (s >= n_spectra || states[s].candidates_begin >= states[s].candidates_end) return;
  const int64_t candidate = states[s].candidates_begin;
  evaluate_candidate(candidate, states + s, logs, excess, distances);
  if (lane_id() == 0 && isfinite(distances[candidate])) {
    states[s].best_index = static_cast<unsigned long long>(candidate);
  }
}

// grid: (a thread for each value). Lowest index among the candidates that reach the best D.
__global__ void __launch_bounds__(kFitThreads)
    select_kernel(int64_t total, const int32_t* __restrict__ owner, const double* __restrict__ distances,
                  SpectrumState* states) {
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

// grid: (a thread for each spectrum).
__global__ void __launch_bounds__(kFitThreads)
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

int fit_power_law_cuda(const double* evals, const int64_t* offsets, const double* least_spread, int64_t total,
                       int64_t n_spectra, const FitSettings& settings, const FitOutputs& outputs, void* workspace,
                       CUstream_st* stream) {
  if (n_spectra == 0) return static_cast<int>(cudaSuccess);
  const FitWorkspace work = carve(workspace, total, n_spectra, nullptr);
  const unsigned spectrum_warps = blocks_for(n_spectra, kWarpsPerBlock);
  prepare_kernel<<<spectrum_warps, kFitThreads, 0, stream>>>(evals, offsets, least_spread, total, n_spectra, settings,
                                                             work.states, outputs.dropped);
  if (total > 0) {
    const unsigned value_threads = blocks_for(total, kFitThreads);
    logs_kernel<<<value_threads, kFitThreads, 0, stream>>>(evals, offsets, total, n_spectra, work.logs, work.owner);
    const unsigned spectra_blocks = static_cast<unsigned>(n_spectra < (1 << 20) ? n_spectra : 1 << 20);
    power_law::scan_short_kernel<<<spectra_blocks, power_law::kScanThreads, 0, stream>>>(n_spectra, work.states,
                                                                                         work.logs, work.excess);
    if (total > kScanChunk) {
      const unsigned slots = blocks_for(total, kScanChunk);
      power_law::scan_long_kernel<ScanPass::smallest_log><<<slots, power_law::kScanThreads, 0, stream>>>(
          total, work.owner, work.states, work.logs, work.excess, work.chunks);
      power_law::scan_long_kernel<ScanPass::sum><<<slots, power_law::kScanThreads, 0, stream>>>(
          total, work.owner, work.states, work.logs, work.excess, work.chunks);
      power_law::scan_long_kernel<ScanPass::store><<<slots, power_law::kScanThreads, 0, stream>>>(
          total, work.owner, work.states, work.logs, work.excess, work.chunks);
    }
    if (settings.rule == XminRule::median) {
      median_kernel<<<spectrum_warps, kFitThreads, 0, stream>>>(n_spectra, work.logs, work.excess, work.states,
                                                                work.distances);
    } else {
      int64_t done_stride = 0;
      for (const int64_t stride : kStrides) {
        const int group = stride == 1 ? kNeighbours : 1;
        const int64_t positions = (total + stride - 1) / stride;
        search_kernel<<<blocks_for(positions, kWarpsPerBlock * group), kFitThreads, 0, stream>>>(
            total, stride, done_stride, group, settings.published, evals, work.owner, work.logs, work.excess,
            work.states, work.distances);
        done_stride = stride;
      }
      select_kernel<<<value_threads, kFitThreads, 0, stream>>>(total, work.owner, work.distances, work.states);
    }
  }
  finish_kernel<<<blocks_for(n_spectra, kFitThreads), kFitThreads, 0, stream>>>(evals, n_spectra, work.states,
                                                                                work.excess, outputs);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace farms_fast
