// One cluster a matrix, which the blocks hold in their registers and shared memory by rows. See cluster_tile.cuh for
// the reduction; each block then searches for its part of the eigenvalues.
#include "csrc/cuda/eigvalsh/one_stage_cluster.h"

#include <algorithm>

#include "csrc/cuda/eigvalsh/cluster_launch.h"
#include "csrc/cuda/eigvalsh/cluster_tile.cuh"
#include "csrc/cuda/eigvalsh/problem.cuh"
#include "csrc/cuda/eigvalsh/spectrum.cuh"
#include "csrc/host/cuda_solvers.h"

namespace farms_fast {
namespace one_stage {
namespace {

// The columns are as many as the rows.
template <int Warps, int Strips, int Tiles, int Spilled, int ColumnGroups, int Blocks>
struct Kernel {
  using Matrix = ClusterTile<Warps, Strips, Tiles, Spilled, ColumnGroups, Blocks>;
  static constexpr int kThreads = 32 * Warps;
  static constexpr int kOrder = Matrix::all_rows;
  static_assert(kOrder == 8 * Tiles * ColumnGroups, "square");

  struct Shared {
    typename Matrix::Spill spill;
    union {
      double slab[kOrder * kPitch];
      double largest[Warps];
      typename Matrix::Vectors vectors;
      Spectrum<kThreads, kOrder> search;
    };
    double diagonal[kOrder], off_diagonal[kOrder];
    double values[kOrder];
    double largest_of[Blocks];
    typename Matrix::Arrivals arrivals;
  };

  static __device__ __forceinline__ void run(const Problem& problem, Shared& shared) {
    const int64_t which = blockIdx.x / Blocks;
    const int order = problem.order, count = order / problem.stride;
    const int rank = cluster_rank(), tid = static_cast<int>(threadIdx.x);
    const int share = (count + Blocks - 1) / Blocks, first = min(rank * share, count), end = min(first + share, count);
    int exponent;
    {
      Matrix matrix(shared.spill, rank);
      matrix.expect(shared.arrivals);
      problem.form(which, matrix, shared.slab);
      const double own_largest = matrix.largest(shared.largest);
      // No block writes to another one that has not begun.
      cluster_sync();
      if (tid < Blocks) cluster_store(&shared.largest_of[rank], tid, own_largest);
      cluster_sync();
      double largest = 0.0;
      for (const double of_block : shared.largest_of) largest = fmax(largest, of_block);
      exponent = matrix.scale(largest);
      if (exponent != Matrix::kNotFinite)
        matrix.tridiagonal(order, shared.vectors, shared.arrivals, shared.diagonal, shared.off_diagonal);
    }
    __syncthreads();

    double value = nan("");
    if (exponent != Matrix::kNotFinite) {
      exponent += shared.search.template find<2>(shared.diagonal, shared.off_diagonal, order, problem.stride, first,
                                                 end, [&](int number, double found) {
                                                   for (int to = 0; to < Blocks; ++to)
                                                     cluster_store(&shared.values[number], to, found);
                                                 });
      cluster_sync();
      if (first + tid < end) value = scalbn(ascending(shared.values, first + tid), exponent);
    }
    if (first + tid < end) problem.store(which, first + tid, value);
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) cluster_kernel(const Problem problem) {
  extern __shared__ __align__(16) double shared_memory[];
#if __CUDA_ARCH__ >= 900
  Kernel::run(problem, *reinterpret_cast<typename Kernel::Shared*>(shared_memory));
#endif
}

// What the choice between the clusters that can hold a matrix rests on.
struct Size {
  int order;
  double cost;  // measured time of one matrix, as a multiple of the fastest size's for the same matrix
  int (*at_once)();
  void (*launch)(const Problem& problem, int64_t count, cudaStream_t stream);
};

template <int Warps, int Strips, int Tiles, int Spilled, int ColumnGroups, int Blocks>
constexpr Size size(double cost) {
  using Of = Kernel<Warps, Strips, Tiles, Spilled, ColumnGroups, Blocks>;
  static_assert(sizeof(typename Of::Shared) <= kClusterSharedBytes, "fits into a block");
  return {Of::kOrder, cost,
          [] {
            const ClusterLaunch launch(cluster_kernel<Of>, dim3(Blocks), Blocks, Of::kThreads,
                                       sizeof(typename Of::Shared), nullptr);
            int clusters = 0;
            FARMS_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, cluster_kernel<Of>, &launch.config));
            return clusters;
          },
          [](const Problem& problem, int64_t count, cudaStream_t stream) {
            const ClusterLaunch launch(cluster_kernel<Of>, dim3(static_cast<unsigned>(count * Blocks)), Blocks,
                                       Of::kThreads, sizeof(typename Of::Shared), stream);
            FARMS_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, cluster_kernel<Of>, problem));
          }};
}

// Eight blocks have the shortest step; two leave room for four times as many matrices at once.
const Size kSizes[] = {
    size<12, 2, 6, 1, 4, 2>(1.23), size<8, 1, 8, 0, 4, 8>(1.0),   size<8, 2, 8, 0, 4, 4>(1.21),
    size<8, 2, 16, 6, 2, 2>(1.6),  size<12, 1, 12, 2, 4, 8>(1.5), size<8, 2, 16, 5, 4, 8>(2.0),
};
constexpr int kCount = sizeof(kSizes) / sizeof(kSizes[0]);

// How many matrices of each size the current device works on at once.
const int* matrices_at_once() {
  static thread_local int known_device = -1, at_once[kCount];
  int device = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  if (device != known_device) {
    for (int i = 0; i < kCount; ++i) at_once[i] = std::max(1, kSizes[i].at_once());
    known_device = device;
  }
  return at_once;
}

}  // namespace

void solve_in_clusters(const Problem& problem, int64_t count, cudaStream_t stream) {
  const int* at_once = matrices_at_once();
  const Size* best = nullptr;
  double least = 0.0;
  for (int i = 0; i < kCount; ++i) {
    if (problem.order > kSizes[i].order) continue;
    const double time = static_cast<double>((count + at_once[i] - 1) / at_once[i]) * kSizes[i].cost;
    if (best == nullptr || time < least) {
      best = &kSizes[i];
      least = time;
    }
  }
  // A grid's first dimension holds 2^31 - 1 blocks.
  best->launch(problem, count, stream);
}

}  // namespace one_stage
}  // namespace farms_fast
