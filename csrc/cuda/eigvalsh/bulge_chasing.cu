// Band of half-width 4 to tridiagonal form: each sweep makes one column tridiagonal by a Householder reflector and
// chases the bulge down the band, 4 columns a step. Four lanes run a sweep; a block runs many of them, each two steps
// behind the one before, in lockstep. The band stays in shared memory where it fits; a longer one passes through it
// once for as many sweeps as a block runs, and through several blocks one behind the other where matrices are few.
#include "csrc/cuda/eigvalsh/async_copy.cuh"
#include "csrc/cuda/eigvalsh/cluster_exchange.cuh"
#include "csrc/cuda/eigvalsh/cluster_launch.h"
#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"

namespace farms_fast {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kLanes = kNarrowBand;  // of a sweep: one for each column, or row, of its 4 x 4 blocks
constexpr int kMaxThreads = 512;
// Columns 10 doubles apart keep the lanes of a warp on different banks; 8 apart is the least there can be.
constexpr int kSpreadPitch = kNarrowColumn + 2;
constexpr int kRing = 2048;  // columns of a long band in shared memory, a power of two: twice what the sweeps span
constexpr int kChunk = 64;   // columns that enter and leave together
constexpr int kChunkSteps = kChunk / kLanes;
constexpr int kRingSlots = kMaxThreads / kLanes;
constexpr int kChunksLimit = 1 << 12;  // more than there are chunks
constexpr int kMostBlocks = 8;         // of a cluster
static_assert(kRingSlots % kChunk == 0 && 8 * kRingSlots + 4 * kChunk <= kRing);

// The band in shared memory: where its column c begins.
template <bool Ring, int Pitch>
struct Band {
  static constexpr uint32_t kElement = sizeof(double), kColumn = Pitch * kElement;
  uint32_t begin;
  __device__ __forceinline__ uint32_t column(int c) const {
    return begin + static_cast<uint32_t>(Ring ? c & (kRing - 1) : c) * kColumn;
  }
};

// A sweep's reflector where it is, v's first element being 1.
struct Bulge {
  double v1, v2, v3, own_v;  // own_v: the lane's
  double tau;
};

// One step of a sweep, in the 4 columns from `start` on; on return the bulge is at its next step. A sweep begins with a
// step that has no reflector yet, `chasing` false, and makes it from column start + 3; the lanes of sweeps that rest
// pass `busy` false too, and write nothing.
template <bool Ring, int Pitch>
__device__ __forceinline__ void chase_step(const Band<Ring, Pitch>& band, int start, int lane, bool chasing, bool busy,
                                           Bulge& bulge) {
  constexpr uint32_t element = sizeof(double);
  // Without a reflector nothing comes of the blocks, whatever they hold.
  const uint32_t own_row = lane * element;
  const int from = chasing ? start : 0;
  uint32_t column[kLanes];
#pragma unroll
  for (int c = 0; c < kLanes; ++c)
    column[c] = Ring ? band.column(from + c) : band.column(from) + static_cast<uint32_t>(c) * band.kColumn;
  const uint32_t own = Ring ? band.column(from + lane) : band.column(from) + static_cast<uint32_t>(lane) * band.kColumn;
  const uint32_t eliminated = chasing ? column[0] + kLanes * element + own_row
                                      : (busy ? band.column(start + kLanes - 1) + element + own_row : column[0]);
  // The block below, of which the lane keeps one row, and the diagonal block, of which it keeps one column.
  double d[kLanes], b[kLanes];
  b[0] = load_shared(eliminated);
#pragma unroll
  for (int c = 1; c < kLanes; ++c) b[c] = load_shared(column[c] + own_row + (kLanes - c) * element);
#pragma unroll
  for (int i = 0; i < kLanes; ++i)
    d[i] = load_shared(i >= lane ? own + i * element - own_row : column[i] + own_row - i * element);
  __syncwarp();  // both are read whole before they are written

  const double tau = bulge.tau, v1 = bulge.v1, v2 = bulge.v2, v3 = bulge.v3, own_v = bulge.own_v;
  const double y = chasing ? tau * ((b[0] + b[1] * v1) + (b[2] * v2 + b[3] * v3)) : 0.0;
  const double x = b[0] - y;
  const auto of_lane = [](double value, int i) { return __shfl_sync(kAll, value, i, kLanes); };
  const double x0 = of_lane(x, 0), x1 = of_lane(x, 1), x2 = of_lane(x, 2), x3 = of_lane(x, 3);
  const double u = tau * ((d[0] + d[1] * v1) + (d[2] * v2 + d[3] * v3));
  const double u0 = of_lane(u, 0), u1 = of_lane(u, 1), u2 = of_lane(u, 2), u3 = of_lane(u, 3);
  const Reflector h = make_reflector(x0, (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3));
  const double half = 0.5 * tau * ((u0 + v1 * u1) + (v2 * u2 + v3 * u3));
  const double own_w = u - half * own_v;
  d[0] -= own_w + (u0 - half) * own_v;
  d[1] -= v1 * own_w + (u1 - half * v1) * own_v;
  d[2] -= v2 * own_w + (u2 - half * v2) * own_v;
  d[3] -= v3 * own_w + (u3 - half * v3) * own_v;
  b[1] -= y * v1;
  b[2] -= y * v2;
  b[3] -= y * v3;
#pragma unroll
  for (int i = 0; i < kLanes; ++i)
    if (chasing && i >= lane) store_shared(own + i * element - own_row, d[i]);

  bulge = {x1 * h.scale, x2 * h.scale, x3 * h.scale, lane == 0 ? 1.0 : x * h.scale, h.tau};
  if (busy) store_shared(eliminated, lane == 0 ? h.beta : 0.0);
#pragma unroll
  for (int c = 1; c < kLanes; ++c) {
    double sum = bulge.own_v * b[c];
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    b[c] -= bulge.own_v * (h.tau * sum);
    if (chasing) store_shared(column[c] + own_row + (kLanes - c) * element, b[c]);
  }
}

// The first step, and then four columns a step.
__device__ __forceinline__ int steps_of(int sweep, int order) { return 1 + (order - sweep - 1 + kLanes - 1) / kLanes; }

__device__ __forceinline__ double element(const double* __restrict__ wide, int c, int below) {
  return below <= kNarrowBand ? wide[wide_index(c + below, c)] : 0.0;
}

// grid: (matrices).
template <int Pitch>
__global__ void __launch_bounds__(kMaxThreads)
    chase_kernel(const double* __restrict__ wide, int order, double* __restrict__ diagonal,
                 double* __restrict__ off_diagonal) {
  extern __shared__ __align__(16) double shared_memory[];
  const Band<false, Pitch> band{shared_address(shared_memory)};
  wide += blockIdx.x * wide_count(order);
  for (int i = threadIdx.x; i < (order + kNarrowColumn) * kNarrowColumn; i += blockDim.x)
    shared_memory[i / kNarrowColumn * Pitch + i % kNarrowColumn] = element(wide, i / kNarrowColumn, i % kNarrowColumn);
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
  Bulge bulge = {};
  for (int time = 0; time < end; ++time) {
    const int sweep = first + slot, step = time - round - 2 * slot;
    const bool busy = sweep < sweeps && step >= 0, chasing = busy && step > 0;
    if (__any_sync(kAll, busy)) {
      chase_step(band, sweep + 1 + (step - 1) * kLanes, lane, chasing, busy, bulge);
      if (busy && step + 1 == steps_of(sweep, order)) {
        round += round_length(first);
        first += slots;
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < order; i += blockDim.x) {
    diagonal[blockIdx.x * static_cast<int64_t>(order) + i] = shared_memory[i * Pitch];
    off_diagonal[blockIdx.x * static_cast<int64_t>(order) + i] = i + 1 < order ? shared_memory[i * Pitch + 1] : 0.0;
  }
}

// grid: (blocks of a cluster, matrices), kMaxThreads threads. A round is kRingSlots sweeps, from one end of the band to
// the other; the blocks take the rounds in turn. A block's progress is kept with the block of the round after: its
// round times kChunksLimit, plus the chunks up to the last one that it has let go.
__global__ void __launch_bounds__(kMaxThreads)
    chase_ring_kernel(const double* __restrict__ wide, int order, double* spill, double* __restrict__ diagonal,
                      double* __restrict__ off_diagonal) {
  extern __shared__ __align__(16) double shared_memory[];
  const Band<true, kSpreadPitch> band{shared_address(shared_memory)};
  const auto place = [&](int c, int below) { return shared_memory + (c & (kRing - 1)) * kSpreadPitch + below; };
  int* progress = reinterpret_cast<int*>(shared_memory + kRing * kSpreadPitch);
  const int columns = order + kNarrowColumn, thread = static_cast<int>(threadIdx.x);
  const int blocks = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  const int64_t matrix = blockIdx.y;
  wide += matrix * wide_count(order);
  spill += matrix * columns * kNarrowColumn;
  for (int i = rank * kMaxThreads + thread; i < columns * kNarrowColumn; i += blocks * kMaxThreads)
    __stcg(spill + i, element(wide, i / kNarrowColumn, i % kNarrowColumn));
  if (thread == 0) *progress = -1;
  __threadfence();
  cluster_sync();

  const auto load = [&](int chunk) {  // zeros past the end
    const int c = chunk * kChunk + thread / (kNarrowColumn / 2), below = thread % (kNarrowColumn / 2) * 2;
    if (thread < kChunk * kNarrowColumn / 2)
      copy_async<2>(place(c, below), c < columns ? spill + c * kNarrowColumn + below : spill, c < columns);
    copy_commit();
  };
  const auto store = [&](int chunk) {
    const int c = chunk * kChunk + thread / kNarrowColumn, below = thread % kNarrowColumn;
    if (c < columns) __stcg(spill + c * kNarrowColumn + below, *place(c, below));
  };
  static_assert(kChunk * kNarrowColumn == kMaxThreads);

  const int slot = thread / kLanes, lane = thread % kLanes, sweeps = order - 2;
  Bulge bulge = {};
  for (int round = rank; round * kRingSlots < sweeps; round += blocks) {
    const auto wait = [&](int chunk) {  // until the round before has let it go
      if (thread == 0 && blocks > 1 && round > 0)
        while (cluster_flag(progress) <= (round - 1) * kChunksLimit + chunk) __nanosleep(20);
      __syncthreads();
    };
    const auto tell = [&](int chunks) {  // what is stored, by all threads before a barrier
      if (thread != 0 || blocks == 1) return;
      __threadfence();
      cluster_store(progress, (rank + 1) % blocks, round * kChunksLimit + chunks);
    };
    const int first = round * kRingSlots, sweep = first + slot;
    const int final_sweep = min(first + kRingSlots, sweeps) - 1, behind = final_sweep - first;
    const int end = 2 * behind + steps_of(final_sweep, order);
    int entered = first / kChunk, left = entered, told = entered;  // chunks
    wait(entered);
    load(entered);
    for (int time = 0; time < end; ++time) {
      if (time % kChunkSteps == 0) {
        // The first sweep is about to reach the chunk on its way in; what the last sweep has passed may leave.
        copy_wait<0>();
        wait(++entered);
        load(entered);
        const int passed = final_sweep + kLanes * (time - 2 * behind - 1);
        for (; (left + 1) * kChunk <= passed && left + 1 < entered; ++left) store(left);
      } else if (told < left) {
        tell(told = left);
      }
      const int step = time - 2 * slot;
      const bool busy = sweep < sweeps && step >= 0 && step < steps_of(sweep, order), chasing = busy && step > 0;
      if (__any_sync(kAll, busy)) chase_step(band, sweep + 1 + (step - 1) * kLanes, lane, chasing, busy, bulge);
      __syncthreads();
    }
    copy_wait<0>();
    __syncthreads();
    for (; left <= entered; ++left) store(left);
    __syncthreads();
    tell(kChunksLimit - 1);
  }
  // Also, a block's shared memory must outlive the stores of the others.
  __threadfence();
  cluster_sync();
  for (int i = rank * kMaxThreads + thread; i < order; i += blocks * kMaxThreads) {
    diagonal[matrix * order + i] = __ldcg(spill + i * kNarrowColumn);
    off_diagonal[matrix * order + i] = i + 1 < order ? __ldcg(spill + i * kNarrowColumn + 1) : 0.0;
  }
}

template <int Pitch>
void launch(const double* band, int batch, int order, double* diagonal, double* off_diagonal, cudaStream_t stream) {
  // Sweeps start two steps apart, so half as many as a sweep has steps can be under way.
  const int useful = ((order / kLanes + 2) / 2 + 1) * kLanes;
  const int threads = useful >= kMaxThreads ? kMaxThreads : (useful + 31) / 32 * 32;
  const int bytes = static_cast<int>(narrow_band_bytes(order, Pitch));
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(chase_kernel<Pitch>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  chase_kernel<Pitch><<<batch, threads, bytes, stream>>>(band, order, diagonal, off_diagonal);
  FARMS_LAUNCH_CHECK();
}

void launch_ring(const double* band, int batch, int order, double* spill, double* diagonal, double* off_diagonal,
                 cudaStream_t stream) {
  int device = 0, processors = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  // A round can begin when the last sweep of the one before has let the first chunks go.
  const int behind = 2 * kRingSlots + 3 * kChunkSteps, under_way = (order / kLanes + 2 * kRingSlots) / behind + 1;
  int blocks = 1;
  while (blocks < kMostBlocks && 2 * blocks <= under_way && 2 * blocks * batch <= processors) blocks *= 2;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
  const ClusterLaunch launch(chase_ring_kernel, grid, grid.x, kMaxThreads,
                             kRing * kSpreadPitch * sizeof(double) + sizeof(int), stream);
  FARMS_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, chase_ring_kernel, band, order, spill, diagonal, off_diagonal));
}

}  // namespace

void chase_bulges(const double* band, int batch, int order, double* spill, double* diagonal, double* off_diagonal,
                  cudaStream_t stream) {
  if (chase_spills(order)) {
    launch_ring(band, batch, order, spill, diagonal, off_diagonal, stream);
  } else if (narrow_band_bytes(order, kSpreadPitch) > kNarrowBandBytes) {
    launch<kNarrowColumn>(band, batch, order, diagonal, off_diagonal, stream);
  } else {
    launch<kSpreadPitch>(band, batch, order, diagonal, off_diagonal, stream);
  }
}

}  // namespace farms_fast
