// One thread an eigenvalue. The matrix sits in shared memory where it fits and passes through in pieces where it does
// not; then the threads of a block count in step, and go on until the last of them is done, so that all reach the
// barriers of a piece. Blocks do not wait for each other.
#include "csrc/cuda/eigvalsh/tridiagonal.h"

#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/sturm.cuh"

namespace farms_fast {
namespace {

using sturm::Minors;
using sturm::Point;
using sturm::Row;
using sturm::Search;

constexpr int kSearchThreads = 128;
constexpr int kResidentRows = 2560;  // rows in shared memory at once, 40 kB

// Where the rows of the matrix are while a block searches.
enum class Storage { shared_memory, passing_through };

// The Gershgorin interval of the whole matrix, by every block of it.
__device__ sturm::Range gershgorin(const double* __restrict__ diagonal, const double* __restrict__ off, int order) {
  __shared__ double lows[kSearchThreads / 32], highs[kSearchThreads / 32];
  double low = INFINITY, high = -INFINITY;
  bool finite = true;
  for (int i = threadIdx.x; i < order; i += kSearchThreads) {
    const double d = diagonal[i], radius = (i > 0 ? fabs(off[i - 1]) : 0.0) + (i < order - 1 ? fabs(off[i]) : 0.0);
    finite = finite && isfinite(d) && isfinite(radius);
    low = fmin(low, d - radius);
    high = fmax(high, d + radius);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    low = fmin(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = fmax(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = low;
    highs[threadIdx.x / 32] = high;
  }
  finite = __syncthreads_and(finite);
  for (int warp = 0; warp < kSearchThreads / 32; ++warp) {
    low = fmin(low, lows[warp]);
    high = fmax(high, highs[warp]);
  }
  return sturm::scaled_range(low, high, finite);
}

// Rows [begin, begin + n) into shared memory, n a multiple of sturm::kGroup.
__device__ void load_rows(const double* __restrict__ diagonal, const double* __restrict__ off, int order, int begin,
                          int n, double scale, Row* rows) {
  for (int r = threadIdx.x; r < n; r += kSearchThreads) {
    const int i = begin + r;
    rows[r] =
        i < order ? sturm::make_row(diagonal[i] * scale, i > 0 ? off[i - 1] * scale : 0.0, i == 0) : sturm::kPadding;
  }
}

// grid: (blocks of a matrix, matrices). Shapes as in tridiagonal.h. Dynamic shared memory: the rows.
template <Storage storage, typename Out>
__global__ void __launch_bounds__(kSearchThreads)
    tridiagonal_kernel(const double* __restrict__ diagonals, const double* __restrict__ off_diagonals, int order,
                       int stride, Out* __restrict__ evals) {
  extern __shared__ Row rows[];
  __shared__ Point points[kSearchThreads + 2];
  const double* diagonal = diagonals + static_cast<int64_t>(blockIdx.y) * order;
  const double* off = off_diagonals + static_cast<int64_t>(blockIdx.y) * order;
  const int count = order / stride;
  Out* out = evals + static_cast<int64_t>(blockIdx.y) * count;
  const int first = blockIdx.x * kSearchThreads, index = first + static_cast<int>(threadIdx.x);
  const int last = min(first + kSearchThreads, count) - 1;
  const int padded = (order + sturm::kGroup - 1) / sturm::kGroup * sturm::kGroup;

  const sturm::Range range = gershgorin(diagonal, off, order);
  if (!range.finite) {
    if (index < count) out[index] = static_cast<Out>(nan(""));
    return;
  }
  if (storage == Storage::shared_memory) {
    load_rows(diagonal, off, order, 0, padded, range.scale, rows);
    __syncthreads();
  }
  const auto evaluate = [&](double x) {
    Minors minors;
    if (storage == Storage::shared_memory) {
      minors.advance(rows, padded, x);
    } else {
      for (int begin = 0; begin < padded; begin += kResidentRows) {
        const int n = min(kResidentRows, padded - begin);
        __syncthreads();
        load_rows(diagonal, off, order, begin, n, range.scale, rows);
        __syncthreads();
        minors.advance(rows, n, x);
      }
    }
    return minors.at(x);
  };

  // Sections: the block's threads count at equidistant points of the interval that holds the block's eigenvalues.
  Point low{range.low, 0.0, 0, 0}, high{range.high, 0.0, 0, order};
  for (int section = gridDim.x > 1 ? 0 : 1; section < 2; ++section) {
    const double step = (high.x - low.x) / (kSearchThreads + 1);
    const Point mine = evaluate(low.x + step * (threadIdx.x + 1));
    __syncthreads();
    points[threadIdx.x + 1] = mine;
    if (threadIdx.x == 0) {
      points[0] = low;
      points[kSearchThreads + 1] = high;
    }
    __syncthreads();
    const int lower = section == 0 ? first : min(index, last), upper = section == 0 ? last : lower;
    low = points[sturm::below(points, kSearchThreads + 2, lower * stride)];
    high = points[sturm::below(points, kSearchThreads + 2, upper * stride) + 1];
  }

  Search search(min(index, last) * stride, low, high);
  if (storage == Storage::shared_memory) {
    while (!search.done()) search.update(evaluate(search.next()));
  } else {
    while (__syncthreads_or(!search.done())) {
      const Point point = evaluate(search.next());
      if (!search.done()) search.update(point);
    }
  }
  if (index < count) out[index] = static_cast<Out>(scalbn(search.result(), range.exponent));
}

// Neighbours that are equal to within the width of their brackets may come out in either order: each becomes the
// largest up to and including itself. grid: (matrices). evals: (batch, count), in place.
template <typename Out>
__global__ void __launch_bounds__(kSearchThreads) ascending_kernel(Out* __restrict__ evals, int count) {
  __shared__ Out warp_largest[kSearchThreads / 32];
  Out* values = evals + static_cast<int64_t>(blockIdx.x) * count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Out largest = -INFINITY;
  for (int begin = 0; begin < count; begin += kSearchThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    Out value = i < count ? values[i] : -INFINITY;
    const bool is_nan = value != value;
    for (int offset = 1; offset < 32; offset *= 2) {
      const Out before = __shfl_up_sync(kAllLanes, value, offset);
      if (lane >= offset) value = fmax(value, before);
    }
    if (lane == 31) warp_largest[warp] = value;
    __syncthreads();
    value = fmax(value, largest);
    for (int w = 0; w < kSearchThreads / 32; ++w) {
      if (w < warp) value = fmax(value, warp_largest[w]);
      largest = fmax(largest, warp_largest[w]);
    }
    if (i < count && !is_nan) values[i] = value;
    __syncthreads();
  }
}

template <typename Out>
void launch(const double* diagonal, const double* off_diagonal, int64_t batch, int order, int stride, Out* evals,
            cudaStream_t stream) {
  const int padded = (order + sturm::kGroup - 1) / sturm::kGroup * sturm::kGroup;
  const bool resident = padded <= kResidentRows;
  const size_t shared_bytes = sizeof(Row) * static_cast<size_t>(resident ? padded : kResidentRows);
  const auto kernel =
      resident ? tridiagonal_kernel<Storage::shared_memory, Out> : tridiagonal_kernel<Storage::passing_through, Out>;
  const int count = order / stride;
  constexpr int64_t most = 65535;  // of a grid's second dimension
  for (int64_t begin = 0; begin < batch; begin += most) {
    const int64_t matrices = batch - begin < most ? batch - begin : most;
    const dim3 grid(static_cast<unsigned>((count + kSearchThreads - 1) / kSearchThreads),
                    static_cast<unsigned>(matrices));
    kernel<<<grid, kSearchThreads, shared_bytes, stream>>>(diagonal + begin * order, off_diagonal + begin * order,
                                                           order, stride, evals + begin * count);
    FARMS_LAUNCH_CHECK();
    ascending_kernel<<<static_cast<unsigned>(matrices), kSearchThreads, 0, stream>>>(evals + begin * count, count);
    FARMS_LAUNCH_CHECK();
  }
}

}  // namespace

void tridiagonal_eigvalsh(const double* diagonal, const double* off_diagonal, int64_t batch, int64_t order, int stride,
                          DType precision, void* evals, cudaStream_t stream) {
  if (batch == 0 || order == 0) return;
  if (precision == DType::f64)
    launch(diagonal, off_diagonal, batch, static_cast<int>(order), stride, static_cast<double*>(evals), stream);
  else
    launch(diagonal, off_diagonal, batch, static_cast<int>(order), stride, static_cast<float*>(evals), stream);
}

}  // namespace farms_fast
