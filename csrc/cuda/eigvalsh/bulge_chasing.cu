// Band of half-width 4 to tridiagonal form: each sweep makes one column tridiagonal by a Householder reflector and
// chases the bulge down the band, 4 columns a step. Four lanes run a sweep; a block runs many of them, each two steps
// behind the one before, in lockstep, with a barrier after each step. The band stays in shared memory where it fits; a
// longer one passes through it once for as many sweeps as a block runs (a round), and through several blocks one behind
// the other where matrices are few: those wait for each other, see chase_ring_kernel.
//
// A step works on rows and columns start + 0..3, the diagonal block D, and on the four rows below, B. A stored column
// begins with its diagonal element, so an element further down its column of the matrix is one double further on:
//
//   column:   0   1   2   3
//   row 0     D                 lane l keeps the row l of B, and of D the column l, whose upper part is row l of
//   row 1     D   D             the triangle
//   row 2     D   D   D
//   row 3     D   D   D   D
//   row 4..7  B   B   B   B
#include "csrc/cuda/eigvalsh/async_copy.cuh"
#include "csrc/cuda/eigvalsh/cluster_exchange.cuh"
#include "csrc/cuda/eigvalsh/cluster_launch.h"
#include "csrc/cuda/eigvalsh/grid_flags.cuh"
#include "csrc/cuda/eigvalsh/householder.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"
#include "csrc/cuda/hopper.h"
#include "csrc/cuda/warp.cuh"

namespace farms_fast {
namespace {

constexpr int kLanes = kNarrowBand;  // of a sweep: one for each column, or row, of its 4 x 4 blocks
constexpr int kChaseThreads = 512;
constexpr int kRingChunk = 64;  // columns that enter and leave a ring together
constexpr int kRingChunkSteps = kRingChunk / kLanes;
constexpr int kRingChunksLimit = 1 << 12;  // more than there are chunks

// How the band lies in shared memory: doubles from a column to the next, and the columns that there is room for, a
// power of two, if not for all. Columns 10 doubles apart keep the lanes of a warp on different banks; 8 apart is the
// least.
struct SpreadBand {
  static constexpr int pitch = kNarrowColumn + 2, ring = 0;
};
struct DenseBand {
  static constexpr int pitch = kNarrowColumn, ring = 0;
};
// Nearly twice what the sweeps of a round span.
struct LongRing {
  static constexpr int pitch = kNarrowColumn + 2, ring = 2048, threads = kChaseThreads;
};
struct ShortRing {
  static constexpr int pitch = kNarrowColumn + 2, ring = 1024, threads = kChaseThreads / 2;
};

// How a ring is used: the sweeps of a round, and its bytes with the flag of its progress.
template <class Config>
struct Ring {
  static constexpr int slots = Config::threads / kLanes;
  static constexpr int shared_bytes = Config::ring * Config::pitch * sizeof(double) + sizeof(int);
  static_assert(slots % kRingChunk == 0 && 8 * slots + 4 * kRingChunk <= Config::ring);
};
static_assert(Ring<LongRing>::shared_bytes <= cuda_device(80).shared_bytes);
static_assert(Ring<ShortRing>::shared_bytes <= cuda_device(86).shared_bytes);

// The band in shared memory: where its column c begins.
template <class Config>
struct Band {
  static constexpr uint32_t kElement = sizeof(double), kColumn = Config::pitch * kElement;
  uint32_t begin;
  __device__ __forceinline__ uint32_t column(int c) const {
    return begin + static_cast<uint32_t>(Config::ring > 0 ? c & (Config::ring - 1) : c) * kColumn;
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
template <class Config>
__device__ __forceinline__ void chase_step(const Band<Config>& band, int start, int lane, bool chasing, bool busy,
                                           Bulge& bulge) {
  constexpr uint32_t element = sizeof(double);
  // Without a reflector nothing comes of the blocks, whatever they hold.
  const uint32_t own_row = lane * element;
  const int from = chasing ? start : 0;
  uint32_t column[kLanes];
#pragma unroll
  for (int c = 0; c < kLanes; ++c)
    column[c] = Config::ring > 0 ? band.column(from + c) : band.column(from) + static_cast<uint32_t>(c) * band.kColumn;
  const uint32_t own =
      Config::ring > 0 ? band.column(from + lane) : band.column(from) + static_cast<uint32_t>(lane) * band.kColumn;
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
  const auto of_lane = [](double value, int i) { return __shfl_sync(kAllLanes, value, i, kLanes); };
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
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    b[c] -= bulge.own_v * (h.tau * sum);
    if (chasing) store_shared(column[c] + own_row + (kLanes - c) * element, b[c]);
  }
}

// The first step, and then four columns a step.
__device__ __forceinline__ int steps_of(int sweep, int order) { return 1 + (order - sweep - 1 + kLanes - 1) / kLanes; }

__device__ __forceinline__ double element(const double* __restrict__ wide, int c, int below) {
  return below <= kNarrowBand ? wide[wide_index(c + below, c)] : 0.0;
}

// grid: (matrices). wide: (batch, wide_count(order)), read only. diagonal, off_diagonal: (batch, order). All waits are
// barriers of the block, once a step, which every thread reaches: all go through the same `end` steps.
template <class Config>
__global__ void __launch_bounds__(kChaseThreads)
    chase_kernel(const double* __restrict__ wide, int order, double* __restrict__ diagonal,
                 double* __restrict__ off_diagonal) {
  extern __shared__ __align__(16) double shared_memory[];
  const Band<Config> band{shared_address(shared_memory)};
  wide += blockIdx.x * wide_count(order);
  for (int i = threadIdx.x; i < (order + kNarrowColumn) * kNarrowColumn; i += blockDim.x)
    shared_memory[i / kNarrowColumn * Config::pitch + i % kNarrowColumn] =
        element(wide, i / kNarrowColumn, i % kNarrowColumn);
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
    if (__any_sync(kAllLanes, busy)) {
      chase_step(band, sweep + 1 + (step - 1) * kLanes, lane, chasing, busy, bulge);
      if (busy && step + 1 == steps_of(sweep, order)) {
        round += round_length(first);
        first += slots;
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < order; i += blockDim.x) {
    diagonal[blockIdx.x * static_cast<int64_t>(order) + i] = shared_memory[i * Config::pitch];
    off_diagonal[blockIdx.x * static_cast<int64_t>(order) + i] =
        i + 1 < order ? shared_memory[i * Config::pitch + 1] : 0.0;
  }
}

// grid: (blocks, matrices). What a ring starts from, and what is left in the end. wide: (batch, wide_count(order)).
// spill: (batch, order + kNarrowColumn, kNarrowColumn).
__global__ void fill_spill_kernel(const double* __restrict__ wide, int order, double* __restrict__ spill) {
  const int columns = order + kNarrowColumn;
  wide += blockIdx.y * wide_count(order);
  spill += static_cast<int64_t>(blockIdx.y) * columns * kNarrowColumn;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < columns * kNarrowColumn; i += gridDim.x * blockDim.x)
    spill[i] = element(wide, i / kNarrowColumn, i % kNarrowColumn);
}
__global__ void read_spill_kernel(const double* __restrict__ spill, int order, double* __restrict__ diagonal,
                                  double* __restrict__ off_diagonal) {
  const int64_t matrix = blockIdx.y;
  spill += matrix * (order + kNarrowColumn) * kNarrowColumn;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < order; i += gridDim.x * blockDim.x) {
    diagonal[matrix * order + i] = spill[i * kNarrowColumn];
    off_diagonal[matrix * order + i] = i + 1 < order ? spill[i * kNarrowColumn + 1] : 0.0;
  }
}

// grid: (blocks of a cluster, matrices), Config::threads threads. Shapes as above; spill: (batch, order +
// kNarrowColumn, kNarrowColumn). A round is one sweep for each of its slots, from one end of the band to the other; the
// blocks take the rounds in turn. A block's progress is kept with the block of the round after, or in a grid without
// clusters in `flags` (batch, kMostFlags), -1 before: its round times kRingChunksLimit, plus the chunks up to the last
// one that it has let go. It only grows.
//
// A block spins only for chunks of the round before, which runs in another block of its cluster or its cooperative
// grid, and that starts as a whole; round 0 waits for nothing, and a round lets its chunks go in order and, at its end,
// all of them. So by induction over rounds each goes on. A block waits for its own last round by having finished it.
template <class Config, bool InCluster>
__global__ void __launch_bounds__(Config::threads) chase_ring_kernel(double* spill, int order, int* flags) {
  extern __shared__ __align__(16) double shared_memory[];
  constexpr int slots = Ring<Config>::slots;
  const Band<Config> band{shared_address(shared_memory)};
  const auto at = [&](int c, int below) { return shared_memory + (c & (Config::ring - 1)) * Config::pitch + below; };
  int* progress = reinterpret_cast<int*>(shared_memory + Config::ring * Config::pitch);
  const int columns = order + kNarrowColumn, thread = static_cast<int>(threadIdx.x);
  const int blocks = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  const int64_t matrix = blockIdx.y;
  spill += matrix * columns * kNarrowColumn;
  flags += matrix * kMostFlags;
  if constexpr (InCluster) {
    if (thread == 0) *progress = -1;
    cluster_sync();
  }

  const auto load = [&](int chunk) {  // zeros past the end
    const int c = chunk * kRingChunk + thread / (kNarrowColumn / 2), below = thread % (kNarrowColumn / 2) * 2;
    if (thread < kRingChunk * kNarrowColumn / 2)
      copy_async<2>(at(c, below), c < columns ? spill + c * kNarrowColumn + below : spill, c < columns);
    copy_commit();
  };
  const auto store = [&](int chunk) {
    for (int i = thread; i < kRingChunk * kNarrowColumn; i += Config::threads) {
      const int c = chunk * kRingChunk + i / kNarrowColumn, below = i % kNarrowColumn;
      if (c < columns) __stcg(spill + c * kNarrowColumn + below, *at(c, below));
    }
  };
  static_assert(kRingChunk * kNarrowColumn / 2 <= Config::threads && kRingChunk * kNarrowColumn % Config::threads == 0);

  const int slot = thread / kLanes, lane = thread % kLanes, sweeps = order - 2;
  Bulge bulge = {};
  for (int round = rank; round * slots < sweeps; round += blocks) {
    const auto wait = [&](int chunk) {  // until the round before has let it go
      if (thread == 0 && blocks > 1 && round > 0)
        while ((InCluster ? cluster_flag(progress) : grid_flag(flags + rank)) <= (round - 1) * kRingChunksLimit + chunk)
          __nanosleep(20);
      __syncthreads();
    };
    const auto tell = [&](int chunks) {  // what is stored, by all threads before a barrier
      if (thread != 0 || blocks == 1) return;
      __threadfence();
      const int next = (rank + 1) % blocks, told = round * kRingChunksLimit + chunks;
      if constexpr (InCluster)
        cluster_store(progress, next, told);
      else
        grid_store(flags + next, told);
    };
    const int first = round * slots, sweep = first + slot;
    const int final_sweep = min(first + slots, sweeps) - 1, behind = final_sweep - first;
    const int end = 2 * behind + steps_of(final_sweep, order);
    int entered = first / kRingChunk, left = entered, told = entered;  // chunks
    wait(entered);
    load(entered);
    for (int time = 0; time < end; ++time) {
      if (time % kRingChunkSteps == 0) {
        // The first sweep is about to reach the chunk on its way in; what the last sweep has passed may leave.
        copy_wait<0>();
        wait(++entered);
        load(entered);
        const int passed = final_sweep + kLanes * (time - 2 * behind - 1);
        for (; (left + 1) * kRingChunk <= passed && left + 1 < entered; ++left) store(left);
      } else if (told < left) {
        tell(told = left);
      }
      const int step = time - 2 * slot;
      const bool busy = sweep < sweeps && step >= 0 && step < steps_of(sweep, order), chasing = busy && step > 0;
      if (__any_sync(kAllLanes, busy)) chase_step(band, sweep + 1 + (step - 1) * kLanes, lane, chasing, busy, bulge);
      __syncthreads();
    }
    copy_wait<0>();
    __syncthreads();
    for (; left <= entered; ++left) store(left);
    __syncthreads();
    tell(kRingChunksLimit - 1);
  }
  // A block's shared memory must outlive the stores of the others.
  if constexpr (InCluster) cluster_sync();
}

template <class Config>
void launch(const double* band, int batch, int order, double* diagonal, double* off_diagonal, cudaStream_t stream) {
  // Sweeps start two steps apart, so half as many as a sweep has steps can be under way.
  const int useful = ((order / kLanes + 2) / 2 + 1) * kLanes;
  const int threads = useful >= kChaseThreads ? kChaseThreads : (useful + 31) / 32 * 32;
  const int bytes = static_cast<int>(narrow_band_bytes(order, Config::pitch));
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(chase_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  chase_kernel<Config><<<batch, threads, bytes, stream>>>(band, order, diagonal, off_diagonal);
  FARMS_LAUNCH_CHECK();
}

template <class Config>
void launch_ring(const double* band, int batch, int order, double* spill, int* flags, double* diagonal,
                 double* off_diagonal, const CudaDevice& device, cudaStream_t stream) {
  constexpr int slots = Ring<Config>::slots, threads = 256, columns_of_block = 32;
  const dim3 columns(static_cast<unsigned>((order + kNarrowColumn) / columns_of_block + 1),
                     static_cast<unsigned>(batch));
  fill_spill_kernel<<<columns, threads, 0, stream>>>(band, order, spill);
  FARMS_LAUNCH_CHECK();
  // A round can begin when the last sweep of the one before has let the first chunks go.
  const int behind = 2 * slots + 3 * kRingChunkSteps, under_way = (order / kLanes + 2 * slots) / behind + 1;
  int blocks = 1;
  while (blocks < hopper::kMaxClusterBlocks && 2 * blocks <= under_way && 2 * blocks * batch <= device.processors)
    blocks *= 2;
  const bool in_clusters = blocks <= device.cluster_blocks;
  const auto kernel = in_clusters ? chase_ring_kernel<Config, true> : chase_ring_kernel<Config, false>;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
  ClusterLaunch launch(kernel, grid, grid.x, Config::threads, Ring<Config>::shared_bytes, stream);
  if (!in_clusters) {
    clear_flags(flags, static_cast<int64_t>(batch) * kMostFlags, stream);
    launch.run_grid_at_once();
  }
  FARMS_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, spill, order, flags));
  read_spill_kernel<<<columns, threads, 0, stream>>>(spill, order, diagonal, off_diagonal);
  FARMS_LAUNCH_CHECK();
}

}  // namespace

void chase_bulges(const double* band, int batch, int order, double* spill, int* flags, double* diagonal,
                  double* off_diagonal, const CudaDevice& device, cudaStream_t stream) {
  if (narrow_band_bytes(order, SpreadBand::pitch) <= device.shared_bytes)
    launch<SpreadBand>(band, batch, order, diagonal, off_diagonal, stream);
  else if (narrow_band_bytes(order, DenseBand::pitch) <= device.shared_bytes)
    launch<DenseBand>(band, batch, order, diagonal, off_diagonal, stream);
  else if (Ring<LongRing>::shared_bytes <= device.shared_bytes)
    launch_ring<LongRing>(band, batch, order, spill, flags, diagonal, off_diagonal, device, stream);
  else
    launch_ring<ShortRing>(band, batch, order, spill, flags, diagonal, off_diagonal, device, stream);
}

}  // namespace farms_fast
