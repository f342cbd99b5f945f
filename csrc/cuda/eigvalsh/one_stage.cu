// One block a matrix, everything in its registers. See tile.cuh for the reduction and sturm.cuh for the search; larger
// matrices are spread over a cluster of blocks.
#include "csrc/cuda/eigvalsh/one_stage.h"

#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/one_stage_cluster.h"
#include "csrc/cuda/eigvalsh/problem.cuh"
#include "csrc/cuda/eigvalsh/spectrum.cuh"
#include "csrc/cuda/eigvalsh/tile.cuh"

namespace farms_fast {
namespace {

using one_stage::Problem;

// What the architecture allows, to keep the compiler from complaining.
#if __CUDA_ARCH__ >= 900
constexpr int kMostBlocks = 32;
#else
constexpr int kMostBlocks = 16;
#endif

template <int Warps, int Strips, int Tiles, int Spilled, int ColumnGroups, int Blocks>
__global__ void __launch_bounds__(32 * Warps, Blocks < kMostBlocks ? Blocks : kMostBlocks)
    one_stage_kernel(const Problem problem) {
  using Matrix = one_stage::Tile<Warps, Strips, Tiles, Spilled, ColumnGroups>;
  extern __shared__ double2 spilled[];
  __shared__ union {
    double slab[Matrix::rows * one_stage::kPitch];
    double largest[Warps];
    typename Matrix::Vectors vectors;
    struct {
      one_stage::Spectrum<32 * Warps, Matrix::rows> search;
      double values[Matrix::rows];
    } spectrum;
  } shared;
  __shared__ double diagonal[Matrix::rows], off_diagonal[Matrix::rows];

  const int64_t which = blockIdx.x;
  const int order = problem.order, count = order / problem.stride;
  int exponent;
  {
    Matrix matrix(*reinterpret_cast<typename Matrix::Spill*>(spilled));
    problem.form(which, matrix, shared.slab);
    exponent = matrix.scale(matrix.largest(shared.largest));
    __syncthreads();
    if (exponent != Matrix::kNotFinite) matrix.tridiagonal(order, shared.vectors, diagonal, off_diagonal);
  }
  __syncthreads();

  double value = nan("");
  const int i = threadIdx.x;
  if (exponent != Matrix::kNotFinite) {
    double* values = shared.spectrum.values;
    exponent += shared.spectrum.search.template find<1>(diagonal, off_diagonal, order, problem.stride, 0, count,
                                                        [&](int number, double found) { values[number] = found; });
    __syncthreads();
    if (i < count) value = scalbn(one_stage::ascending(values, i), exponent);
  }
  if (i < count) problem.store(which, i, value);
}

template <int Warps, int Strips, int Tiles, int Spilled, int ColumnGroups, int Blocks>
void launch(const Problem& problem, int64_t count, cudaStream_t stream) {
  const auto kernel = one_stage_kernel<Warps, Strips, Tiles, Spilled, ColumnGroups, Blocks>;
  const int bytes =
      Spilled > 0
          ? static_cast<int>(sizeof(typename one_stage::Tile<Warps, Strips, Tiles, Spilled, ColumnGroups>::Spill))
          : 0;
  if (bytes > 0) FARMS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(count), 32 * Warps, bytes, stream>>>(problem);
  FARMS_LAUNCH_CHECK();
}

// Blocks a multiprocessor, and columns in shared memory so that the registers of that many blocks hold the rest.
void solve(const Problem& problem, int64_t count, cudaStream_t stream) {
  if (count == 0 || problem.order == 0) return;
  if (problem.order <= 16) return launch<1, 1, 2, 0, 1, 20>(problem, count, stream);
  if (problem.order <= 32) return launch<2, 1, 4, 0, 1, 10>(problem, count, stream);
  if (problem.order <= 48) return launch<3, 1, 6, 2, 1, 6>(problem, count, stream);
  if (problem.order <= 64) return launch<4, 1, 8, 0, 1, 4>(problem, count, stream);
  if (problem.order <= 80) return launch<5, 1, 10, 2, 1, 3>(problem, count, stream);
  if (problem.order <= 104) return launch<7, 1, 13, 5, 1, 2>(problem, count, stream);
  if (problem.order <= 128) return launch<8, 1, 16, 8, 1, 2>(problem, count, stream);
  if (problem.order <= kOneBlockOrder) return launch<10, 2, 10, 4, 2, 1>(problem, count, stream);
  one_stage::solve_in_clusters(problem, count, stream);
}

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
