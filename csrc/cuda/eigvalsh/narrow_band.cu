// Band of half-width 32 to half-width 4. A sweep makes four columns narrow by four Householder reflectors and chases
// the bulge down the band, 32 columns a step; a warp runs one sweep, the warps of a block follow each other at a safe
// distance. A step's 32 columns stay in the warp's shared memory, rows or columns of them in its registers.
#include "../check.h"
#include "async_copy.cuh"
#include "householder.cuh"
#include "two_stage.h"

namespace farms_fast {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kPitch = kWideColumn + 2;  // doubles; rows and columns of the window then both touch all banks once
constexpr int kMaxWarps = 12;            // their windows fill an SM's shared memory
constexpr int kMostBlocks = 8;           // of a cluster
constexpr int kClusterWarps = kProgress / kMostBlocks;  // of each of its blocks
constexpr int kStepsLimit = 1 << 12;                    // more than the steps of a sweep

// One warp's. The window's column c holds rows c..: element (i, c) is at column[c][i - c].
struct Shared {
  double column[kWideBand][kPitch];
  double v[kNarrowBand][kWideBand];  // this sweep's reflectors at its current step
  double w[kWideBand];
  double tau[kNarrowBand];
};

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// f(i, x[i]) for every element of x, which all lanes read at once, 16 bytes at a time.
template <typename F>
__device__ __forceinline__ void for_each(const double* x, const F& f) {
#pragma unroll
  for (int i = 0; i < kWideBand; i += 2) {
    const double2 pair = *reinterpret_cast<const double2*>(x + i);
    f(i, pair.x);
    f(i + 1, pair.y);
  }
}

__device__ __forceinline__ double dot(const double (&a)[kWideBand], const double* x) {
  double sum[4] = {};
  for_each(x, [&](int i, double xi) { sum[i % 4] += a[i] * xi; });
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The reflectors of the sweep's first four columns; they become narrow. A lane keeps one row.
__device__ void begin_sweep(double* __restrict__ band, int column, int lane, Shared& shared) {
  double row[kNarrowBand];
#pragma unroll
  for (int q = 0; q < kNarrowBand; ++q)
    row[q] = __ldcg(band + static_cast<int64_t>(column + q) * kWideColumn + kNarrowBand + lane - q);
#pragma unroll
  for (int q = 0; q < kNarrowBand; ++q) {
    const double x = lane >= q ? row[q] : 0.0;
    double sum[kNarrowBand];
#pragma unroll
    for (int l = q; l < kNarrowBand; ++l) sum[l] = warp_sum(x * row[l]);
    const Reflector h = make_reflector(__shfl_sync(kAll, row[q], q), sum[q]);
    const double v = lane > q ? x * h.scale : (lane == q ? 1.0 : 0.0);
#pragma unroll
    for (int l = q + 1; l < kNarrowBand; ++l)
      row[l] -= v * (h.tau * h.scale * (sum[l] - h.beta * __shfl_sync(kAll, row[l], q)));
    if (lane >= q) row[q] = lane == q ? h.beta : 0.0;
    shared.v[q][lane] = v;
    if (lane == 0) shared.tau[q] = h.tau;
  }
#pragma unroll
  for (int q = 0; q < kNarrowBand; ++q)
    __stcg(band + static_cast<int64_t>(column + q) * kWideColumn + kNarrowBand + lane - q, row[q]);
  __syncwarp();
}

// Both sides of the diagonal block. A lane keeps one column.
__device__ __forceinline__ void reflect_diagonal(int lane, Shared& shared) {
  double d[kWideBand];
#pragma unroll
  for (int i = 0; i < kWideBand; ++i) d[i] = i >= lane ? shared.column[lane][i - lane] : shared.column[i][lane - i];
  __syncwarp();
#pragma unroll 1
  for (int q = 0; q < kNarrowBand; ++q) {
    const double tau = shared.tau[q], own = shared.v[q][lane];
    double v[kWideBand], sum[4] = {};
    for_each(shared.v[q], [&](int i, double vi) {
      v[i] = vi;
      sum[i % 4] += d[i] * vi;
    });
    const double u = tau * ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    const double w = u - 0.5 * tau * warp_sum(own * u) * own;
    shared.w[lane] = w;
    __syncwarp();
    for_each(shared.w, [&](int i, double wi) { d[i] -= v[i] * w + wi * own; });
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kWideBand; ++i)
    if (i >= lane) shared.column[lane][i - lane] = d[i];
}

// The block below it: the reflectors from the right, then its own first four columns' from the left, which are the
// next step's.
__device__ __forceinline__ void reflect_below(int lane, Shared& shared) {
  double b[kWideBand];
  // A lane keeps one row.
#pragma unroll
  for (int c = 0; c < kWideBand; ++c) b[c] = shared.column[c][kWideBand + lane - c];
#pragma unroll 1
  for (int q = 0; q < kNarrowBand; ++q) {
    const double* v = shared.v[q];
    const double y = shared.tau[q] * dot(b, v);
    for_each(v, [&](int c, double vc) { b[c] -= y * vc; });
  }
#pragma unroll
  for (int c = 0; c < kWideBand; ++c) shared.column[c][kWideBand + lane - c] = b[c];
  __syncwarp();

  // A lane keeps one column.
#pragma unroll
  for (int i = 0; i < kWideBand; ++i) b[i] = shared.column[lane][kWideBand + i - lane];
#pragma unroll
  for (int q = 0; q < kNarrowBand; ++q) {
    double* x = shared.w;
    if (lane == q)
#pragma unroll
      for (int i = 0; i < kWideBand; i += 2)
        *reinterpret_cast<double2*>(x + i) = make_double2(i >= q ? b[i] : 0.0, i + 1 >= q ? b[i + 1] : 0.0);
    __syncwarp();
    const double sum = dot(b, x), own = x[lane];
    const Reflector h = make_reflector(x[q], __shfl_sync(kAll, sum, q));
    const double coefficient = lane > q ? h.tau * h.scale * (sum - h.beta * b[q]) : 0.0;
    const double scaled = coefficient * h.scale;
    b[q] -= coefficient;
    for_each(x, [&](int i, double xi) {
      if (i > q) b[i] -= xi * scaled;
    });
    if (lane == q) {
      b[q] = h.beta;
#pragma unroll
      for (int i = q + 1; i < kWideBand; ++i) b[i] = 0;
    }
    shared.v[q][lane] = lane > q ? own * h.scale : (lane == q ? 1.0 : 0.0);
    if (lane == 0) shared.tau[q] = h.tau;
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kWideBand; ++i) shared.column[lane][kWideBand + i - lane] = b[i];
  __syncwarp();
}

// 32 columns of the band, each as far down as the window goes, in 16-byte pairs.
__device__ __forceinline__ void load_window(const double* __restrict__ window, int lane, Shared& shared) {
#pragma unroll 8
  for (int c = 0; c < kWideBand; ++c)
    if (2 * lane < kWideColumn - c) copy_async<2>(&shared.column[c][2 * lane], window + c * kWideColumn + 2 * lane);
  copy_commit();
  copy_wait<0>();
  __syncwarp();
}
__device__ __forceinline__ void store_window(double* __restrict__ window, int lane, const Shared& shared) {
#pragma unroll 8
  for (int c = 0; c < kWideBand; ++c)
    if (2 * lane < kWideColumn - c)
      __stcg(reinterpret_cast<double2*>(window + c * kWideColumn + 2 * lane),
             *reinterpret_cast<const double2*>(&shared.column[c][2 * lane]));
}

// Orders what this thread wrote or read before and after, for the warps that work on the same matrix.
template <bool Cluster>
__device__ __forceinline__ void fence() {
  if constexpr (Cluster)
    __threadfence();
  else
    __threadfence_block();
}

// grid: (blocks of a cluster, matrices). The warps of a matrix take the sweeps in turn. Warp w's progress: its sweep
// times kStepsLimit, plus the steps that it has finished of it; step t of a sweep needs step t + 1 of the sweep before.
// With one block to a matrix (Cluster false) it is kept in shared memory, else in global memory, from -1 on.
template <bool Cluster>
__global__ void __launch_bounds__(kMaxWarps * 32) narrow_kernel(double* __restrict__ bands, int order, int* progress) {
  extern __shared__ __align__(16) double shared_memory[];
  const int block_warps = static_cast<int>(blockDim.x) / 32, block_warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = block_warps * static_cast<int>(gridDim.x);
  const int warp = static_cast<int>(blockIdx.x) * block_warps + block_warp;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Shared& shared = reinterpret_cast<Shared*>(shared_memory)[block_warp];
  double* band = bands + blockIdx.y * static_cast<int64_t>(order + kWideColumn) * kWideColumn;
  if constexpr (Cluster) {
    progress += blockIdx.y * static_cast<int64_t>(warps);
  } else {
    progress = reinterpret_cast<int*>(reinterpret_cast<Shared*>(shared_memory) + block_warps);
    if (lane == 0) progress[warp] = -1;
    __syncthreads();
  }

  int sweep = warp;
  for (; sweep * kNarrowBand + kNarrowBand + 1 < order; sweep += warps) {
    const int column = sweep * kNarrowBand, first = column + kNarrowBand;
    const int steps = (order - first + kWideBand - 1) / kWideBand;
    const int before = (sweep + warps - 1) % warps;
    for (int step = 0; step < steps; ++step) {
      if (sweep > 0) {
        const int needed = (sweep - 1) * kStepsLimit + step + 2;
        if (lane == 0)
          while (atomicOr(progress + before, 0) < needed) __nanosleep(32);
        fence<Cluster>();
        __syncwarp();
      }
      if (step == 0) begin_sweep(band, column, lane, shared);
      double* window = band + static_cast<int64_t>(first + step * kWideBand) * kWideColumn;
      load_window(window, lane, shared);
      reflect_diagonal(lane, shared);
      __syncwarp();
      reflect_below(lane, shared);
      store_window(window, lane, shared);
      fence<Cluster>();
      __syncwarp();
      // The last step leaves every step of the sweep after free to go.
      if (lane == 0)
        atomicExch(progress + warp, sweep * kStepsLimit + (step + 1 == steps ? kStepsLimit - 1 : step + 1));
    }
  }
}

// grid: (blocks of rows of the band, matrices).
__global__ void extract_kernel(const double* __restrict__ gram, int order, double* __restrict__ band) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int row = static_cast<int>(at / kWideColumn), below = static_cast<int>(at % kWideColumn);
  if (row >= order + kWideColumn) return;
  double* out = band + blockIdx.y * static_cast<int64_t>(order + kWideColumn) * kWideColumn;
  // Threads run along a row of the matrix, which is where it is contiguous; each zero is written in place.
  const int column = row - kWideBand + below;
  if (below <= kWideBand && column >= 0) {
    const double value = row < order ? gram[(static_cast<int64_t>(blockIdx.y) * order + row) * order + column] : 0.0;
    out[static_cast<int64_t>(column) * kWideColumn + row - column] = value;
  }
  if (below > kWideBand || row + below >= order + kWideColumn) out[static_cast<int64_t>(row) * kWideColumn + below] = 0;
}

}  // namespace

void extract_band(const double* gram, int batch, int order, double* band, cudaStream_t stream) {
  constexpr int threads = 256;
  const int64_t elements = static_cast<int64_t>(order + kWideColumn) * kWideColumn;
  const dim3 grid(static_cast<unsigned>((elements + threads - 1) / threads), static_cast<unsigned>(batch));
  extract_kernel<<<grid, threads, 0, stream>>>(gram, order, band);
  FARMS_LAUNCH_CHECK();
}

void narrow_band(double* band, int batch, int order, int* progress, cudaStream_t stream) {
  int device = 0, processors = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  // More warps than sweeps that can be under way find nothing to do. Many matrices share a multiprocessor; a few large
  // ones are spread over several.
  const int useful = (order / kWideBand + 1) / 2 + 1;
  int warps = batch > 2 * processors ? 4 : (batch > processors ? 6 : kMaxWarps);
  int blocks = 1;
  if (useful > kMaxWarps)
    while (blocks < kMostBlocks && blocks * kClusterWarps < useful && 2 * blocks * batch <= processors) blocks *= 2;
  if (blocks > 1) warps = kClusterWarps;
  warps = useful < warps ? useful : warps;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
  config.blockDim = dim3(static_cast<unsigned>(warps) * 32);
  config.dynamicSmemBytes = warps * (sizeof(Shared) + sizeof(int));
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {config.gridDim.x, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto kernel = blocks > 1 ? narrow_kernel<true> : narrow_kernel<false>;
  if (blocks > 1) FARMS_CUDA_CHECK(cudaMemsetAsync(progress, 0xff, sizeof(int) * batch * blocks * warps, stream));
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(config.dynamicSmemBytes)));
  FARMS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, band, order, progress));
}

}  // namespace farms_fast
