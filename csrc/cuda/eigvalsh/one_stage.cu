// Small matrices: one block a matrix, everything in its registers, in one launch from the window to the eigenvalues.
// See block_reduction.cuh for the reduction and spectrum.cuh for the search; larger matrices are spread over a cluster
// of blocks (one_stage_cluster.cu).
//
// The blocks of a launch do not know of each other: the only waits are __syncthreads(), which all threads of a block
// reach, since what they branch on around one (the exponent, the order) is the same in all of them.
#include "csrc/cuda/eigvalsh/one_stage.h"

#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/block_reduction.cuh"
#include "csrc/cuda/eigvalsh/one_stage_cluster.h"
#include "csrc/cuda/eigvalsh/problem.cuh"
#include "csrc/cuda/eigvalsh/spectrum.cuh"

namespace farms_fast {
namespace {

using one_stage::BlockReduction;
using one_stage::MatrixConfig;
using one_stage::OneStageProblem;
using one_stage::Spectrum;

// Blocks that a multiprocessor holds at a time, whatever they ask for.
#if __CUDA_ARCH__ >= 900
constexpr int kMaxBlocks = 32;
#else
constexpr int kMaxBlocks = 16;
#endif

// Named by the largest order that each takes. In all of them eight rows and eight columns of the matrix are one mma
// tile; the spilled tiles are as many as leave the registers of `blocks_per_processor` blocks to hold the rest.
struct Order16 : MatrixConfig {
  static constexpr int warps = 1, tiles = 2, blocks_per_processor = 20;
};
struct Order32 : MatrixConfig {
  static constexpr int warps = 2, tiles = 4, blocks_per_processor = 10;
};
struct Order48 : MatrixConfig {
  static constexpr int warps = 3, tiles = 6, spilled_tiles = 2, blocks_per_processor = 6;
};
struct Order64 : MatrixConfig {
  static constexpr int warps = 4, tiles = 8, blocks_per_processor = 4;
};
struct Order80 : MatrixConfig {
  static constexpr int warps = 5, tiles = 10, spilled_tiles = 2, blocks_per_processor = 3;
};
struct Order104 : MatrixConfig {
  static constexpr int warps = 7, tiles = 13, spilled_tiles = 5, blocks_per_processor = 2;
};
struct Order128 : MatrixConfig {
  static constexpr int warps = 8, tiles = 16, spilled_tiles = 8, blocks_per_processor = 2;
};
// A warp has all of 32 rows here: half the wavefronts of shared memory in a pass, for twice the registers.
struct Order160 : MatrixConfig {
  static constexpr int warps = 10, strips = 2, tiles = 10, spilled_tiles = 4, column_groups = 2;
};

template <class Config>
struct BlockSolver {
  using Reduction = BlockReduction<Config>;
  static constexpr int threads = Reduction::threads;
  static constexpr int max_order = 8 * Config::tiles * Config::column_groups;

  // The phases of a matrix follow each other, with a barrier in between.
  union Shared {
    double slab[Reduction::rows * one_stage::kSlabPitch];
    double largest[Config::warps];
    typename Reduction::StepVectors vectors;
    struct {
      Spectrum<Config> search;
      double values[Reduction::rows];
    } spectrum;
  };
  static constexpr int spill_bytes = Config::spilled_tiles > 0 ? sizeof(typename Reduction::Spill) : 0;
  static constexpr int shared_bytes = sizeof(Shared) + 2 * Reduction::rows * sizeof(double) + spill_bytes;
  static_assert(hopper::shared_memory_holds(Config::blocks_per_processor, shared_bytes));
};

// grid: (matrices). Dynamic shared memory: the tiles that the registers do not hold.
template <class Config>
__global__ void __launch_bounds__(BlockSolver<Config>::threads,
                                  Config::blocks_per_processor < kMaxBlocks ? Config::blocks_per_processor : kMaxBlocks)
    one_stage_kernel(const OneStageProblem problem) {
  using Reduction = BlockReduction<Config>;
  extern __shared__ double2 spilled[];
  __shared__ typename BlockSolver<Config>::Shared shared;
  __shared__ double diagonal[Reduction::rows], off_diagonal[Reduction::rows];

  const int64_t which = blockIdx.x;
  const int order = problem.order, count = order / problem.stride;
  int exponent;
  {
    Reduction matrix(*reinterpret_cast<typename Reduction::Spill*>(spilled));
    problem.form(which, matrix, shared.slab);
    exponent = matrix.scale(matrix.largest(shared.largest));
    __syncthreads();  // shared.largest has been read
    if (exponent != Reduction::kNonfinite) matrix.tridiagonal(order, shared.vectors, diagonal, off_diagonal);
  }
  __syncthreads();  // the tridiagonal matrix is there, and the vectors are done with

  double value = nan("");
  const int i = threadIdx.x;
  if (exponent != Reduction::kNonfinite) {
    double* values = shared.spectrum.values;
    exponent += shared.spectrum.search.template find<1>(diagonal, off_diagonal, order, problem.stride, 0, count,
                                                        [&](int number, double found) { values[number] = found; });
    __syncthreads();  // all values are there
    if (i < count) value = scalbn(one_stage::ascending(values, i), exponent);
  }
  if (i < count) problem.store(which, i, value);
}

template <class Config>
void launch(const OneStageProblem& problem, int64_t count, cudaStream_t stream) {
  using Solver = BlockSolver<Config>;
  const auto kernel = one_stage_kernel<Config>;
  if (Solver::spill_bytes > 0)
    FARMS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Solver::spill_bytes));
  kernel<<<static_cast<unsigned>(count), Solver::threads, Solver::spill_bytes, stream>>>(problem);
  FARMS_LAUNCH_CHECK();
}

struct BlockOption {
  int order, shared_bytes;
  void (*launch)(const OneStageProblem& problem, int64_t count, cudaStream_t stream);
};

template <class Config>
constexpr BlockOption option() {
  return {BlockSolver<Config>::max_order, BlockSolver<Config>::shared_bytes, launch<Config>};
}

constexpr BlockOption kBlockOptions[] = {
    option<Order16>(), option<Order32>(),  option<Order48>(),  option<Order64>(),
    option<Order80>(), option<Order104>(), option<Order128>(), option<Order160>(),
};

void solve(const OneStageProblem& problem, int64_t count, cudaStream_t stream) {
  if (count == 0 || problem.order == 0) return;
  for (const BlockOption& block : kBlockOptions)
    if (problem.order <= block.order) return block.launch(problem, count, stream);
  one_stage::solve_in_clusters(problem, count, stream);
}

// Whether a plan for a GPU counts on the largest order whose block fits.
constexpr bool plan_is_right(int architecture) {
  const int64_t shared_bytes = cuda_device(architecture).shared_bytes;
  int order = 0;
  for (const BlockOption& block : kBlockOptions)
    if (block.shared_bytes <= shared_bytes) order = block.order;
  return order == one_block_order(shared_bytes);
}
static_assert(plan_is_right(70) && plan_is_right(75) && plan_is_right(80) && plan_is_right(86) && plan_is_right(90) &&
              plan_is_right(120));

}  // namespace

void one_stage_windows(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision, void* evals,
                       cudaStream_t stream) {
  const int stride = is_complex(in) ? 2 : 1;
  solve({windows, nullptr, in, static_cast<int>(order) * stride, stride, 0, evals, precision == DType::f32, true},
        count, stream);
}

void one_stage_gram(const void* gram, int64_t count, int64_t order, DType dtype, DType precision, bool clip,
                    void* evals, cudaStream_t stream) {
  const int stride = is_complex(dtype) ? 2 : 1;
  const int64_t bytes = order * order * static_cast<int64_t>(item_size(dtype));
  solve({nullptr, gram, dtype, static_cast<int>(order) * stride, stride, bytes, evals, precision == DType::f32, clip},
        count, stream);
}

}  // namespace farms_fast
