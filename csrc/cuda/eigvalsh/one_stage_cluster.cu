// Matrices that one block cannot hold: one cluster a matrix, whose blocks hold it in their registers and shared memory
// by rows. See cluster_reduction.cuh for the reduction; each block then searches for its part of the eigenvalues.
//
// The blocks of a cluster wait for each other, at barriers of the cluster and for pieces that a neighbour has sent. The
// hardware starts all blocks of a cluster or none, so that whoever is waited for is running; each block goes through
// the same steps, for what they branch on has the same bits in all blocks. Clusters do not know of each other.
#include "csrc/cuda/eigvalsh/one_stage_cluster.h"

#include <algorithm>

#include "csrc/cuda/eigvalsh/cluster_launch.h"
#include "csrc/cuda/eigvalsh/cluster_reduction.cuh"
#include "csrc/cuda/eigvalsh/problem.cuh"
#include "csrc/cuda/eigvalsh/spectrum.cuh"

namespace farms_fast {
namespace one_stage {
namespace {

// Named by the largest order and the blocks that share it; a block has a multiprocessor to itself. `cost` is the
// measured time of one matrix as a multiple of that in the fastest cluster that can hold it. Eight blocks have the
// shortest step; two leave room for four times as many matrices at once.
struct Order192In2 : MatrixConfig {
  static constexpr int warps = 12, strips = 2, tiles = 6, spilled_tiles = 1, column_groups = 4, cluster_blocks = 2;
  static constexpr double cost = 1.23;
};
struct Order256In8 : MatrixConfig {
  static constexpr int warps = 8, tiles = 8, column_groups = 4, cluster_blocks = 8;
  static constexpr double cost = 1.0;
};
struct Order256In4 : MatrixConfig {
  static constexpr int warps = 8, strips = 2, tiles = 8, column_groups = 4, cluster_blocks = 4;
  static constexpr double cost = 1.21;
};
struct Order256In2 : MatrixConfig {
  static constexpr int warps = 8, strips = 2, tiles = 16, spilled_tiles = 6, column_groups = 2, cluster_blocks = 2;
  static constexpr double cost = 1.6;
};
struct Order384In8 : MatrixConfig {
  static constexpr int warps = 12, tiles = 12, spilled_tiles = 2, column_groups = 4, cluster_blocks = 8;
  static constexpr double cost = 1.5;
};
// The compiler spills another 392 bytes a thread, which is faster than a sixth tile in shared memory.
struct Order512In8 : MatrixConfig {
  static constexpr int warps = 8, strips = 2, tiles = 16, spilled_tiles = 5, column_groups = 4, cluster_blocks = 8;
  static constexpr double cost = 2.0;
};

template <class Config>
struct ClusterSolver {
  using Reduction = ClusterReduction<Config>;
  static constexpr int threads = Reduction::threads, blocks = Config::cluster_blocks;
  static constexpr int max_order = Reduction::all_rows;
  static_assert(max_order == 8 * Config::tiles * Config::column_groups, "square");

  struct Shared {
    typename Reduction::Spill spill;
    union {
      double slab[max_order * kSlabPitch];
      double largest[Config::warps];
      typename Reduction::ExchangedVectors vectors;
      Spectrum<Config> search;
    };
    double diagonal[max_order], off_diagonal[max_order];
    double values[max_order];
    double largest_of[blocks];
    typename Reduction::Arrivals arrivals;
  };
  static_assert(hopper::shared_memory_holds(1, sizeof(Shared)));

  static __device__ __forceinline__ void run(const OneStageProblem& problem, Shared& shared) {
    const int64_t which = blockIdx.x / blocks;
    const int order = problem.order, count = order / problem.stride;
    const int rank = cluster_rank(), tid = static_cast<int>(threadIdx.x);
    const int share = (count + blocks - 1) / blocks, first = min(rank * share, count), end = min(first + share, count);
    int exponent;
    {
      Reduction matrix(shared.spill, rank);
      matrix.expect(shared.arrivals);
      problem.form(which, matrix, shared.slab);
      const double own_largest = matrix.largest(shared.largest);
      // No block writes to another one that has not begun, or has not set up its arrival barriers.
      cluster_sync();
      if (tid < blocks) cluster_store(&shared.largest_of[rank], tid, own_largest);
      cluster_sync();  // every block's largest has come
      double largest = 0.0;
      for (const double of_block : shared.largest_of) largest = fmax(largest, of_block);
      exponent = matrix.scale(largest);
      if (exponent != Reduction::kNonfinite)
        matrix.tridiagonal(order, shared.vectors, shared.arrivals, shared.diagonal, shared.off_diagonal);
    }
    __syncthreads();  // the tridiagonal matrix is there, and the vectors are done with

    double value = nan("");
    if (exponent != Reduction::kNonfinite) {
      exponent += shared.search.template find<2>(shared.diagonal, shared.off_diagonal, order, problem.stride, first,
                                                 end, [&](int number, double found) {
                                                   for (int to = 0; to < blocks; ++to)
                                                     cluster_store(&shared.values[number], to, found);
                                                 });
      cluster_sync();  // all values have come, and no block has gone that another one still writes to
      if (first + tid < end) value = scalbn(ascending(shared.values, first + tid), exponent);
    }
    if (first + tid < end) problem.store(which, first + tid, value);
  }
};

// grid: (matrices times blocks of a cluster). Dynamic shared memory: a Solver::Shared.
template <class Solver>
__global__ void __launch_bounds__(Solver::threads, 1) cluster_kernel(const OneStageProblem problem) {
  extern __shared__ __align__(16) double shared_memory[];
#if __CUDA_ARCH__ >= 900
  Solver::run(problem, *reinterpret_cast<typename Solver::Shared*>(shared_memory));
#endif
}

// What the choice between the clusters that can hold a matrix rests on.
struct ClusterOption {
  int order;
  double cost;
  int (*at_once)();  // matrices that the current device works on at a time
  void (*launch)(const OneStageProblem& problem, int64_t count, cudaStream_t stream);
};

template <class Config>
ClusterLaunch cluster_launch(int64_t count, cudaStream_t stream) {
  using Solver = ClusterSolver<Config>;
  // A grid's first dimension holds 2^31 - 1 blocks.
  return {cluster_kernel<Solver>,
          dim3(static_cast<unsigned>(count * Solver::blocks)),
          Solver::blocks,
          Solver::threads,
          sizeof(typename Solver::Shared),
          stream};
}

template <class Config>
constexpr ClusterOption option() {
  using Solver = ClusterSolver<Config>;
  return {Solver::max_order, Config::cost,
          [] {
            const ClusterLaunch launch = cluster_launch<Config>(1, nullptr);
            int clusters = 0;
            FARMS_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, cluster_kernel<Solver>, &launch.config));
            return clusters;
          },
          [](const OneStageProblem& problem, int64_t count, cudaStream_t stream) {
            const ClusterLaunch launch = cluster_launch<Config>(count, stream);
            FARMS_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, cluster_kernel<Solver>, problem));
          }};
}

const ClusterOption kClusterOptions[] = {
    option<Order192In2>(), option<Order256In8>(), option<Order256In4>(),
    option<Order256In2>(), option<Order384In8>(), option<Order512In8>(),
};
constexpr int kMaxClusterOrder = 512;
constexpr int kCount = sizeof(kClusterOptions) / sizeof(kClusterOptions[0]);

// How many matrices of each option the current device works on at once.
const int* matrices_at_once() {
  static thread_local int known_device = -1, at_once[kCount];
  int device = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  if (device != known_device) {
    for (int i = 0; i < kCount; ++i) at_once[i] = std::max(1, kClusterOptions[i].at_once());
    known_device = device;
  }
  return at_once;
}

}  // namespace

int max_cluster_order() {
  int device = 0, clusters = 0, bytes = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return clusters != 0 && bytes >= hopper::kBlockSharedBytes ? kMaxClusterOrder : 0;
}

void solve_in_clusters(const OneStageProblem& problem, int64_t count, cudaStream_t stream) {
  const int* at_once = matrices_at_once();
  const ClusterOption* best = nullptr;
  double least = 0.0;
  for (int i = 0; i < kCount; ++i) {
    if (problem.order > kClusterOptions[i].order) continue;
    const double time = static_cast<double>((count + at_once[i] - 1) / at_once[i]) * kClusterOptions[i].cost;
    if (best == nullptr || time < least) {
      best = &kClusterOptions[i];
      least = time;
    }
  }
  best->launch(problem, count, stream);
}

}  // namespace one_stage
}  // namespace farms_fast
