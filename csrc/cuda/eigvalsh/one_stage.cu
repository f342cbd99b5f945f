// One block a matrix, everything in its registers. See tile.cuh for the reduction and sturm.cuh for the search.
#include "one_stage.h"

#include "../check.h"
#include "sturm.cuh"
#include "tile.cuh"

namespace farms_fast {
namespace {

struct Problem {
  const WindowView* windows;  // null for Gram matrices
  const void* gram;
  DType type;  // of the windows or the Gram matrices
  int order;   // of the real matrix: twice the complex one's
  int stride;  // 2 where each eigenvalue is there twice
  int64_t gram_bytes;
  void* evals;
  bool single;  // float32 eigenvalues
};

// Eigenvalues of the tridiagonal matrix in shared memory, one thread each.
template <int Threads>
struct Spectrum {
  sturm::Row rows[Threads / 2 + sturm::kGroup];
  sturm::Point points[Threads + 2];
  double values[Threads / 2];

  // Every warp for itself.
  __device__ __forceinline__ sturm::Range range(const double* diagonal, const double* off, int order) const {
    double low = INFINITY, high = -INFINITY;
    for (int i = threadIdx.x % 32; i < order; i += 32) {
      const double radius = (i > 0 ? fabs(off[i - 1]) : 0.0) + (i < order - 1 ? fabs(off[i]) : 0.0);
      low = fmin(low, diagonal[i] - radius);
      high = fmax(high, diagonal[i] + radius);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      low = fmin(low, __shfl_xor_sync(~0u, low, offset));
      high = fmax(high, __shfl_xor_sync(~0u, high, offset));
    }
    return sturm::scaled_range(low, high, true);
  }

  // stride 2 leaves out every second of a complex matrix's doubled eigenvalues. Returns how many values there are now,
  // and log2 of what they are to be multiplied with.
  __device__ __forceinline__ int find(const double* diagonal, const double* off, int order, int stride) {
    const sturm::Range scaled = range(diagonal, off, order);
    const int padded = (order + sturm::kGroup - 1) / sturm::kGroup * sturm::kGroup;
    for (int i = threadIdx.x; i < padded; i += Threads)
      rows[i] = i < order ? sturm::make_row(diagonal[i] * scaled.scale, i > 0 ? off[i - 1] * scaled.scale : 0.0, i == 0)
                          : sturm::kPadding;
    __syncthreads();
    const auto evaluate = [&](double x) {
      sturm::Minors minors;
      minors.advance(rows, padded, x);
      return minors.at(x);
    };
    const double step = (scaled.high - scaled.low) / (Threads + 1);
    points[threadIdx.x + 1] = evaluate(scaled.low + step * (threadIdx.x + 1));
    if (threadIdx.x == 0) {
      points[0] = {scaled.low, 0.0, 0, 0};
      points[Threads + 1] = {scaled.high, 0.0, 0, order};
    }
    __syncthreads();
    const int index = static_cast<int>(threadIdx.x) * stride;
    if (index < order) {
      const int at = sturm::below(points, Threads + 2, index);
      sturm::Search search(index, points[at], points[at + 1]);
      while (!search.done()) search.update(evaluate(search.next()));
      values[threadIdx.x] = search.result();
    }
    __syncthreads();
    return scaled.exponent;
  }

  // Neighbours equal to within their brackets' width may come out in either order: the largest up to and including i.
  __device__ __forceinline__ double ascending(int i) const {
    double largest = values[i];
    // The widest cluster whose values a bracket's width can hold reaches back no further than its first member.
    for (int j = i - 1; j >= 0 && values[j] > values[i] - 4 * sturm::kWidth; --j) largest = fmax(largest, values[j]);
    return largest;
  }
};

// What the architecture allows, to keep the compiler from complaining.
#if __CUDA_ARCH__ >= 900
constexpr int kMostBlocks = 32;
#else
constexpr int kMostBlocks = 16;
#endif

template <int Warps, int Tiles, int Spilled, int Blocks>
__global__ void __launch_bounds__(32 * Warps, Blocks < kMostBlocks ? Blocks : kMostBlocks)
    one_stage_kernel(const Problem problem) {
  using Matrix = one_stage::Tile<Warps, Tiles, Spilled>;
  constexpr int threads = 32 * Warps;
  extern __shared__ double2 spilled[];
  __shared__ union {
    double slab[Matrix::rows * one_stage::kPitch];
    double largest[Warps];
    typename Matrix::Vectors vectors;
    Spectrum<threads> spectrum;
  } shared;
  __shared__ double diagonal[Matrix::rows], off_diagonal[Matrix::rows];

  const int64_t which = blockIdx.x;
  const int order = problem.order, stride = problem.stride, count = order / stride;
  int exponent;
  {
    Matrix matrix(*reinterpret_cast<typename Matrix::Spill*>(spilled));
    if (problem.windows != nullptr) {
      matrix.gram(problem.windows[which], problem.type, order, shared.slab);
    } else {
      matrix.read({static_cast<const char*>(problem.gram) + which * problem.gram_bytes, problem.type, order});
    }
    exponent = matrix.scale(shared.largest);
    __syncthreads();
    if (exponent != Matrix::kNotFinite) matrix.tridiagonal(order, shared.vectors, diagonal, off_diagonal);
  }
  __syncthreads();

  double value = nan("");
  const int i = threadIdx.x;
  if (exponent != Matrix::kNotFinite) {
    exponent += shared.spectrum.find(diagonal, off_diagonal, order, stride);
    if (i < count) value = scalbn(shared.spectrum.ascending(i), exponent);
    if (problem.windows != nullptr && value < 0.0) value = 0.0;
  }
  if (i >= count) return;
  if (problem.single)
    static_cast<float*>(problem.evals)[which * count + i] = static_cast<float>(value);
  else
    static_cast<double*>(problem.evals)[which * count + i] = value;
}

template <int Warps, int Tiles, int Spilled, int Blocks>
void launch(const Problem& problem, int64_t count, cudaStream_t stream) {
  const auto kernel = one_stage_kernel<Warps, Tiles, Spilled, Blocks>;
  const int bytes = Spilled > 0 ? static_cast<int>(sizeof(typename one_stage::Tile<Warps, Tiles, Spilled>::Spill)) : 0;
  if (bytes > 0) FARMS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(count), 32 * Warps, bytes, stream>>>(problem);
  FARMS_LAUNCH_CHECK();
}

// Blocks a multiprocessor, and columns in shared memory so that the registers of that many blocks hold the rest.
void solve(const Problem& problem, int64_t count, cudaStream_t stream) {
  if (count == 0 || problem.order == 0) return;
  if (problem.order <= 16) return launch<1, 2, 0, 20>(problem, count, stream);
  if (problem.order <= 32) return launch<2, 4, 0, 10>(problem, count, stream);
  if (problem.order <= 48) return launch<3, 6, 2, 6>(problem, count, stream);
  if (problem.order <= 64) return launch<4, 8, 0, 4>(problem, count, stream);
  if (problem.order <= 80) return launch<5, 10, 2, 3>(problem, count, stream);
  if (problem.order <= 104) return launch<7, 13, 5, 2>(problem, count, stream);
  if (problem.order <= 128) return launch<8, 16, 8, 2>(problem, count, stream);
  return launch<10, 20, 8, 1>(problem, count, stream);
}

// What the shared memory of a block allows: 110 kB for order 160, 88 for 128, 56 for 104.
int max_real_order() {
  int device = 0, bytes = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes >= 112 << 10 ? 160 : bytes >= 90 << 10 ? 128 : 104;
}

}  // namespace

int64_t one_stage_max_order(DType dtype) { return is_complex(dtype) ? max_real_order() / 2 : max_real_order(); }

void one_stage_windows(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision, void* evals,
                       cudaStream_t stream) {
  const int stride = is_complex(in) ? 2 : 1;
  solve({windows, nullptr, in, static_cast<int>(order) * stride, stride, 0, evals, precision == DType::f32}, count,
        stream);
}

void one_stage_gram(const void* gram, int64_t count, int64_t order, DType dtype, void* evals, cudaStream_t stream) {
  const int stride = is_complex(dtype) ? 2 : 1;
  const int64_t bytes = order * order * static_cast<int64_t>(item_size(dtype));
  solve({nullptr, gram, dtype, static_cast<int>(order) * stride, stride, bytes, evals, !is_double(dtype)}, count,
        stream);
}

}  // namespace farms_fast
