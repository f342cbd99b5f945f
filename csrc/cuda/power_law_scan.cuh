// The sums of logarithms of every tail of many spectra: excess[i] = sum over j >= i of ln l_j - ln l_i, added up from
// the largest value down.
//
// A block walks a spectrum in tiles. A long spectrum is cut into chunks, counted from its top, that several blocks walk
// at once: one pass finds each chunk's smallest logarithm, one its sum, and the last adds what the chunks above it
// found. The order of additions depends only on the distance from the top, so a spectrum gives the same bits alone and
// packed.
//
// The host does not know where spectra begin. The array is therefore cut into slots as long as a chunk; a chunk belongs
// to the slot that its top lies in. A long spectrum has one top in each slot that it reaches from above. Two long
// spectra may share a slot, never three, and each of them covers the slot's first or its last value.
#pragma once

#include <cuda_runtime.h>

#include "csrc/cuda/power_law_search.cuh"
#include "csrc/power_law_common.h"

namespace farms_fast::power_law {

constexpr int kScanThreads = 512;
constexpr int kScanWarps = kScanThreads / kWarpSize;
constexpr int kScanItems = 4;
constexpr int kScanTile = kScanThreads * kScanItems;
constexpr int kScanChunk = 4 * kScanTile;

struct SpectrumState {
  int64_t begin;  // values that enter the fit, as indices into evals
  int64_t end;
  int64_t candidates_begin;
  int64_t candidates_end;
  double least_spread;
  unsigned long long best_bits;   // of D; distances are not negative, so bits order as values do
  unsigned long long best_index;  // lowest index with that D
  int64_t failure;                // FitStatus when known before the search, ok otherwise
};

// What a chunk adds to those below it.
struct ChunkSummary {
  double smallest_log;
  CompensatedSum sum;
};

// What a part of a spectrum is given by those above it.
struct Carry {
  double log = INFINITY;
  CompensatedSum sum{0.0, 0.0};
};

struct ScanShared {
  double logs[kScanWarps];
  CompensatedSum sums[kScanWarps];
};

__device__ __forceinline__ CompensatedSum shuffle_up(const CompensatedSum& sum, int offset) {
  return {__shfl_up_sync(kAllLanes, sum.value, offset), __shfl_up_sync(kAllLanes, sum.error, offset)};
}

// Walks depths begin..end - 1 of a spectrum, depth d being the value top - d, with two scans a tile: the smallest
// logarithm so far (ordered_log) and the sum of excess_term. With Write, the ordered logarithms and the sums are
// stored.
template <bool Write>
__device__ __forceinline__ void scan_depths(ScanShared& shared, int64_t top, int64_t begin, int64_t end,
                                            double* __restrict__ logs, double* __restrict__ excess, Carry& carry) {
  const int lane = lane_id();
  const int warp = threadIdx.x / kWarpSize;
  for (int64_t tile = begin; tile < end; tile += kScanTile) {
    const int64_t depth = tile + static_cast<int64_t>(threadIdx.x) * kScanItems;
    double here[kScanItems];
    double smallest = INFINITY;
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      here[k] = depth + k < end ? logs[top - depth - k] : INFINITY;
      smallest = ordered_log(here[k], smallest);
      here[k] = smallest;
    }
    double scanned = smallest;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const double other = __shfl_up_sync(kAllLanes, scanned, offset);
      if (lane >= offset) scanned = ordered_log(other, scanned);
    }
    if (lane == kWarpSize - 1) shared.logs[warp] = scanned;
    __syncthreads();
    double next = __shfl_up_sync(kAllLanes, scanned, 1);
    if (lane == 0) next = INFINITY;
    double tile_log = carry.log;
    for (int w = 0; w < kScanWarps; ++w) {
      if (w == warp) next = ordered_log(next, tile_log);
      tile_log = ordered_log(shared.logs[w], tile_log);
    }
    carry.log = tile_log;

    CompensatedSum sum{0.0, 0.0};
    CompensatedSum partial[kScanItems];
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      here[k] = ordered_log(here[k], next);
      if (depth + k < end) {
        if (depth + k > 0) sum.accumulate(excess_term(depth + k, here[k], next));
        if constexpr (Write) logs[top - depth - k] = here[k];
      }
      partial[k] = sum;
      next = here[k];
    }
    CompensatedSum scanned_sum = sum;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      CompensatedSum other = shuffle_up(scanned_sum, offset);
      if (lane >= offset) {
        other.accumulate(scanned_sum);
        scanned_sum = other;
      }
    }
    if (lane == kWarpSize - 1) shared.sums[warp] = scanned_sum;
    CompensatedSum before = shuffle_up(scanned_sum, 1);
    if (lane == 0) before = CompensatedSum{0.0, 0.0};
    __syncthreads();
    for (int w = 0; w < kScanWarps; ++w) {
      if (w == warp) {
        CompensatedSum from_top = carry.sum;
        from_top.accumulate(before);
        before = from_top;
      }
      carry.sum.accumulate(shared.sums[w]);
    }
    if constexpr (Write) {
#pragma unroll
      for (int k = 0; k < kScanItems; ++k) {
        if (depth + k < end) {
          CompensatedSum from_top = before;
          from_top.accumulate(partial[k]);
          excess[top - depth - k] = from_top.rounded();
        }
      }
    }
    __syncthreads();
  }
}

// grid: any number of blocks, which take the spectra in turn; those of one chunk are scanned.
__global__ void __launch_bounds__(kScanThreads)
    scan_short_kernel(int64_t n_spectra, const SpectrumState* __restrict__ states, double* __restrict__ logs,
                      double* __restrict__ excess) {
  __shared__ ScanShared shared;
  for (int64_t s = blockIdx.x; s < n_spectra; s += gridDim.x) {
    const int64_t size = states[s].end - states[s].begin;
    if (size > kScanChunk) continue;
    Carry none;
    scan_depths<true>(shared, states[s].end - 1, 0, size, logs, excess, none);
  }
}

// The chunk whose top lies in a slot, of the long spectrum that covers the slot's last value (which = 0) or its first
// (which = 1).
struct SlotChunk {
  bool exists = false;
  int64_t top = 0;    // of the spectrum
  int64_t begin = 0;  // depths
  int64_t end = 0;
  int64_t spectrum = -1;

  __device__ SlotChunk(int64_t slot, int which, int64_t total, const int32_t* owner, const SpectrumState* states) {
    const int64_t first = slot * kScanChunk;
    const int64_t last = min(first + kScanChunk, total) - 1;
    if (which == 1 && owner[first] == owner[last]) return;
    spectrum = owner[which == 0 ? last : first];
    if (spectrum < 0) return;
    top = states[spectrum].end - 1;
    const int64_t size = states[spectrum].end - states[spectrum].begin;
    if (size <= kScanChunk || top < first) return;
    const int64_t chunk = top > last ? (top - last + kScanChunk - 1) / kScanChunk : 0;
    begin = chunk * kScanChunk;
    end = min(begin + kScanChunk, size);
    exists = begin < size && top - begin >= first;
  }
};

// Where the summary of the chunk of a spectrum is kept whose top lies in a slot.
__device__ __forceinline__ int64_t summary_at(int64_t slot, int64_t spectrum, int64_t total, const int32_t* owner) {
  const int64_t last = min((slot + 1) * kScanChunk, total) - 1;
  return 2 * slot + (owner[last] == spectrum ? 0 : 1);
}

enum class ScanPass { smallest_log, sum, store };

// grid: (slots). summaries: (2 slots,), each written in one pass and read by others in the next: passes
// are launches, and no block waits for another.
template <ScanPass Pass>
__global__ void __launch_bounds__(kScanThreads)
    scan_long_kernel(int64_t total, const int32_t* __restrict__ owner, const SpectrumState* __restrict__ states,
                     double* __restrict__ logs, double* __restrict__ excess, ChunkSummary* summaries) {
  __shared__ ScanShared shared;
  __shared__ Carry given;
  const int64_t slot = blockIdx.x;
  for (int which = 0; which < 2; ++which) {
    const SlotChunk chunk(slot, which, total, owner, states);
    if (!chunk.exists) continue;
    ChunkSummary* const mine = summaries + summary_at(slot, chunk.spectrum, total, owner);
    if constexpr (Pass == ScanPass::smallest_log) {
      double smallest = INFINITY;
      for (int64_t depth = chunk.begin + threadIdx.x; depth < chunk.end; depth += kScanThreads)
        smallest = ordered_log(logs[chunk.top - depth], smallest);
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        smallest = ordered_log(__shfl_xor_sync(kAllLanes, smallest, offset), smallest);
      if (lane_id() == 0) shared.logs[threadIdx.x / kWarpSize] = smallest;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int w = 0; w < kScanWarps; ++w) smallest = ordered_log(shared.logs[w], smallest);
        mine->smallest_log = smallest;
      }
      __syncthreads();
    } else {
      if (threadIdx.x == 0) {
        Carry carry;
        const int64_t above = chunk.begin / kScanChunk;
        for (int64_t a = above; a > 0; --a) {
          const ChunkSummary& summary = summaries[summary_at(slot + a, chunk.spectrum, total, owner)];
          carry.log = ordered_log(summary.smallest_log, carry.log);
          if constexpr (Pass == ScanPass::store) carry.sum.accumulate(summary.sum);
        }
        given = carry;
      }
      __syncthreads();
      Carry carry = given;
      scan_depths<Pass == ScanPass::store>(shared, chunk.top, chunk.begin, chunk.end, logs, excess, carry);
      if (Pass == ScanPass::sum && threadIdx.x == 0) mine->sum = carry.sum;
    }
  }
}

}  // namespace farms_fast::power_law
