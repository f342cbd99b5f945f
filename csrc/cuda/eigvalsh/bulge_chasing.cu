// Band of half-width 4 to tridiagonal form: each sweep makes one column tridiagonal by a Householder reflector and
// chases the bulge down the band, 4 columns a step. Four lanes run a sweep; a block runs many of them, each two steps
// behind the one before, in lockstep. The band stays in shared memory where it fits; a longer one passes through it
// once for as many sweeps as a block runs.
#include "../check.h"
#include "async_copy.cuh"
#include "householder.cuh"
#include "two_stage.h"

namespace farms_fast {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kLanes = kNarrowBand;  // of a sweep: one for each column, or row, of its 4 x 4 blocks
constexpr int kMaxThreads = 512;
constexpr int64_t kSharedBytes = 224 * 1024;
// Columns 10 doubles apart keep the lanes of a warp on different banks; 8 apart is the least there can be.
constexpr int kSpreadPitch = kNarrowColumn + 2;
constexpr int kRing = 2048;  // columns of a long band in shared memory, a power of two: twice what the sweeps span
constexpr int kChunk = 64;   // columns that enter and leave together
constexpr int kChunkSteps = kChunk / kLanes;
constexpr int kRingSlots = kMaxThreads / kLanes;
static_assert(kRingSlots % kChunk == 0 && 8 * kRingSlots + 4 * kChunk <= kRing);

// value of each of the four lanes of this sweep.
__device__ __forceinline__ void gather(double value, double (&all)[kLanes]) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) all[i] = __shfl_sync(kAll, value, i, kLanes);
}

// The band in shared memory: where its column c begins.
template <bool Ring, int Pitch>
struct Band {
  double* begin;
  __device__ __forceinline__ double* column(int c) const { return begin + (Ring ? c & (kRing - 1) : c) * Pitch; }
};

// One step of a sweep, in the 4 columns from `start` on. v, tau: its reflector there on entry, at its next step on
// return, which is made from the column at `eliminated`. A sweep begins with a step that has no reflector yet,
// `chasing` false; lanes of sweeps that rest pass `busy` false too, and write nothing.
template <bool Ring, int Pitch>
__device__ __forceinline__ void chase_step(const Band<Ring, Pitch>& band, int start, double* eliminated, int lane,
                                           bool chasing, bool busy, double (&v)[kLanes], double& tau) {
  // Both sides of the diagonal block; the lane keeps one column.
  double d[kLanes], b[kLanes], u = 0, own_v = 0, all[kLanes];
  // Offsets from the first column are constants where columns do not wrap around.
  double* origin = band.column(start);
  const auto column = [&](int c) { return Ring ? band.column(start + c) : origin + c * Pitch; };
  double* own = column(lane);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const int at = i >= lane ? lane * (Pitch - 1) + i : i * (Pitch - 1) + lane;
    const double* from = Ring ? (i >= lane ? own + i - lane : column(i) + lane - i) : origin + at;
    d[i] = chasing ? *from : 0.0;
  }
  // And the block below; the lane keeps one row.
  b[0] = busy ? eliminated[lane] : 0.0;
#pragma unroll
  for (int c = 1; c < kLanes; ++c) b[c] = chasing ? column(c)[kLanes + lane - c] : 0.0;
  __syncwarp();  // both are read whole before they are written
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    u += d[i] * v[i];
    own_v = i == lane ? v[i] : own_v;
  }
  u *= tau;
  double y = (b[0] * v[0] + b[1] * v[1]) + (b[2] * v[2] + b[3] * v[3]);
  y *= tau;
#pragma unroll
  for (int c = 0; c < kLanes; ++c) b[c] -= y * v[c];
  gather(u, all);
  const double half = 0.5 * tau * ((v[0] * all[0] + v[1] * all[1]) + (v[2] * all[2] + v[3] * all[3]));
  const double own_w = u - half * own_v;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    d[i] -= v[i] * own_w + (all[i] - half * v[i]) * own_v;
    if (chasing && i >= lane) own[i - lane] = d[i];
  }

  gather(b[0], v);
  const Reflector h = make_reflector(v[0], (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]));
  tau = h.tau;
  v[0] = 1;
#pragma unroll
  for (int i = 1; i < kLanes; ++i) v[i] *= h.scale;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) own_v = i == lane ? v[i] : own_v;
  if (busy) eliminated[lane] = lane == 0 ? h.beta : 0.0;
#pragma unroll
  for (int c = 1; c < kLanes; ++c) {
    double sum = own_v * b[c];
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    b[c] -= own_v * (tau * sum);
    if (chasing) column(c)[kLanes + lane - c] = b[c];
  }
}

// The first step, and then four columns a step.
__device__ __forceinline__ int steps_of(int sweep, int order) { return 1 + (order - sweep - 1 + kLanes - 1) / kLanes; }

__device__ __forceinline__ double element(const double* __restrict__ wide, int c, int below) {
  return below <= kNarrowBand ? wide[static_cast<int64_t>(c) * kWideColumn + below] : 0.0;
}

// grid: (matrices).
template <int Pitch>
__global__ void __launch_bounds__(kMaxThreads)
    chase_kernel(const double* __restrict__ wide, int order, double* __restrict__ diagonal,
                 double* __restrict__ off_diagonal) {
  extern __shared__ __align__(16) double shared_memory[];
  const Band<false, Pitch> band{shared_memory};
  wide += blockIdx.x * static_cast<int64_t>(order + kWideColumn) * kWideColumn;
  for (int i = threadIdx.x; i < (order + kNarrowColumn) * kNarrowColumn; i += blockDim.x)
    band.column(i / kNarrowColumn)[i % kNarrowColumn] = element(wide, i / kNarrowColumn, i % kNarrowColumn);
  __syncthreads();

  // Slot j takes the sweeps j, j + slots, ... A round of the slots begins when both the first slot's sweep of the round
  // before is over and the last slot's has begun, two steps apart from slot to slot.
  const int slots = static_cast<int>(blockDim.x) / kLanes;
  const int slot = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const int sweeps = order - 2;
  const auto round_length = [&](int first) { return max(2 * slots, steps_of(first, order)); };
  int end = 0;
  for (int first = 0, round = 0; first < sweeps; first += slots) {
    const int final_sweep = min(first + slots, sweeps) - 1;
    end = round + 2 * (final_sweep - first) + steps_of(final_sweep, order);
    round += round_length(first);
  }
  int first = 0, round = 0;
  double v[kLanes] = {}, tau = 0;
  for (int time = 0; time < end; ++time) {
    const int sweep = first + slot, step = time - round - 2 * slot;
    const bool busy = sweep < sweeps && step >= 0, chasing = busy && step > 0;
    if (__any_sync(kAll, busy)) {
      if (!chasing) tau = 0;
      const int start = sweep + 1 + (step - 1) * kLanes;
      double* eliminated = chasing ? band.column(start) + kLanes : band.column(sweep) + 1;
      chase_step(band, start, eliminated, lane, chasing, busy, v, tau);
      if (busy && step + 1 == steps_of(sweep, order)) {
        round += round_length(first);
        first += slots;
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < order; i += blockDim.x) {
    diagonal[blockIdx.x * static_cast<int64_t>(order) + i] = band.column(i)[0];
    off_diagonal[blockIdx.x * static_cast<int64_t>(order) + i] = i + 1 < order ? band.column(i)[1] : 0.0;
  }
}

// grid: (matrices), kMaxThreads threads. A round of kRingSlots sweeps at a time, from one end of the band to the other.
__global__ void __launch_bounds__(kMaxThreads)
    chase_ring_kernel(const double* __restrict__ wide, int order, double* spill, double* __restrict__ diagonal,
                      double* __restrict__ off_diagonal) {
  extern __shared__ __align__(16) double shared_memory[];
  const Band<true, kSpreadPitch> band{shared_memory};
  const int columns = order + kNarrowColumn, thread = static_cast<int>(threadIdx.x);
  wide += blockIdx.x * static_cast<int64_t>(order + kWideColumn) * kWideColumn;
  spill += blockIdx.x * static_cast<int64_t>(columns) * kNarrowColumn;
  for (int i = thread; i < columns * kNarrowColumn; i += kMaxThreads)
    spill[i] = element(wide, i / kNarrowColumn, i % kNarrowColumn);
  __syncthreads();

  const auto load = [&](int chunk) {  // zeros past the end
    const int c = chunk * kChunk + thread / (kNarrowColumn / 2), below = thread % (kNarrowColumn / 2) * 2;
    if (thread < kChunk * kNarrowColumn / 2)
      copy_async<2>(band.column(c) + below, c < columns ? spill + c * kNarrowColumn + below : spill, c < columns);
    copy_commit();
  };
  const auto store = [&](int chunk) {
    const int c = chunk * kChunk + thread / kNarrowColumn, below = thread % kNarrowColumn;
    if (c < columns) __stcg(spill + c * kNarrowColumn + below, band.column(c)[below]);
  };
  static_assert(kChunk * kNarrowColumn == kMaxThreads);

  const int slot = thread / kLanes, lane = thread % kLanes, sweeps = order - 2;
  double v[kLanes] = {}, tau = 0;
  for (int first = 0; first < sweeps; first += kRingSlots) {
    const int sweep = first + slot, final_sweep = min(first + kRingSlots, sweeps) - 1, behind = final_sweep - first;
    const int end = 2 * behind + steps_of(final_sweep, order);
    int entered = first / kChunk, left = entered;  // chunks
    load(entered);
    for (int time = 0; time < end; ++time) {
      if (time % kChunkSteps == 0) {
        // The first sweep is about to reach the chunk on its way in; what the last sweep has passed may leave.
        copy_wait<0>();
        __syncthreads();
        load(++entered);
        const int passed = final_sweep + kLanes * (time - 2 * behind - 1);
        for (; (left + 1) * kChunk <= passed && left + 1 < entered; ++left) store(left);
      }
      const int step = time - 2 * slot;
      const bool busy = sweep < sweeps && step >= 0 && step < steps_of(sweep, order), chasing = busy && step > 0;
      if (__any_sync(kAll, busy)) {
        if (!chasing) tau = 0;
        const int start = sweep + 1 + (step - 1) * kLanes;
        double* eliminated = chasing ? band.column(start) + kLanes : band.column(sweep) + 1;
        chase_step(band, start, eliminated, lane, chasing, busy, v, tau);
      }
      __syncthreads();
    }
    copy_wait<0>();
    __syncthreads();
    for (; left <= entered; ++left) store(left);
    __syncthreads();
  }
  for (int i = thread; i < order; i += kMaxThreads) {
    diagonal[blockIdx.x * static_cast<int64_t>(order) + i] = __ldcg(spill + i * kNarrowColumn);
    off_diagonal[blockIdx.x * static_cast<int64_t>(order) + i] =
        i + 1 < order ? __ldcg(spill + i * kNarrowColumn + 1) : 0.0;
  }
}

int64_t band_bytes(int64_t order, int pitch) {
  return (order + kNarrowColumn) * pitch * static_cast<int64_t>(sizeof(double));
}

template <int Pitch>
void launch(const double* band, int batch, int order, double* diagonal, double* off_diagonal, cudaStream_t stream) {
  // Sweeps start two steps apart, so half as many as a sweep has steps can be under way.
  const int useful = ((order / kLanes + 2) / 2 + 1) * kLanes;
  const int threads = useful >= kMaxThreads ? kMaxThreads : (useful + 31) / 32 * 32;
  const int bytes = static_cast<int>(band_bytes(order, Pitch));
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(chase_kernel<Pitch>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  chase_kernel<Pitch><<<batch, threads, bytes, stream>>>(band, order, diagonal, off_diagonal);
  FARMS_LAUNCH_CHECK();
}

}  // namespace

bool chase_spills(int64_t order) { return band_bytes(order, kNarrowColumn) > kSharedBytes; }

void chase_bulges(const double* band, int batch, int order, double* spill, double* diagonal, double* off_diagonal,
                  cudaStream_t stream) {
  if (chase_spills(order)) {
    constexpr int bytes = kRing * kSpreadPitch * sizeof(double);
    FARMS_CUDA_CHECK(cudaFuncSetAttribute(chase_ring_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    chase_ring_kernel<<<batch, kMaxThreads, bytes, stream>>>(band, order, spill, diagonal, off_diagonal);
    FARMS_LAUNCH_CHECK();
  } else if (band_bytes(order, kSpreadPitch) > kSharedBytes) {
    launch<kNarrowColumn>(band, batch, order, diagonal, off_diagonal, stream);
  } else {
    launch<kSpreadPitch>(band, batch, order, diagonal, off_diagonal, stream);
  }
}

}  // namespace farms_fast
