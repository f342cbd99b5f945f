// A block forms one 64 x 64 tile of the band of a matrix's products, for one group of inner starts. It keeps the sum in
// registers while it goes backward from the group's last start, and sets it aside at each of the others; then forward
// from there, and at each window's end adds what was set aside and writes the tile to every window that it meets.
#include "csrc/cuda/shared_gram.h"

#include <algorithm>

#include "csrc/cuda/check.h"
#include "csrc/cuda/gram_tile.cuh"
#include "csrc/host/gram_sharing.h"

namespace farms_fast {
namespace {

using namespace gram_tile;

// The tables are of int64_t throughout. Lists are counted in them from their front.
struct SharedMatrix {
  const void* data;  // of the first vector, the first element
  int64_t vector_stride, element_stride;
  int64_t vectors, inner;
  int64_t first_gram;         // of the run, in the result
  int64_t tiles_before;       // to form of the matrices before this one
  int64_t tiles, tile_count;  // list of ProductTile
  int64_t groups;             // list of InnerGroup
  int64_t vector_starts;      // list
  int64_t inner_starts, inner_count;
  int64_t windows;  // list, [vector start][inner start]
};
static_assert(sizeof(SharedMatrix) % sizeof(int64_t) == 0);

struct ProductTile {
  int64_t row, column;  // first vectors
  int64_t begin, end;   // vector starts whose windows meet the tile
};

constexpr int kGramWarps = kGramThreads / 32;
constexpr int kSumsPerThread = kGramTile * kGramTile / kGramThreads;  // of a plane

// Where element (row, column) of a tile lies in shared memory: no two of a warp's accesses meet in a bank, be they of
// neighbours in a row, in a column, or in the layout of the products.
__device__ __forceinline__ int staged(int row, int column) {
  return row * kGramTile + (column ^ ((row & 1) | (row & 2) << 2 | (row & 4) >> 1 | (row & 8) >> 1));
}

// Writes a tile to one window that it meets, whose first vector is `start`.
template <typename Kind>
__device__ __forceinline__ void write_window(const double* tile, const ProductTile& tile_at, int64_t start,
                                             int64_t order, bool to_float32, void* gram, int64_t matrix) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool diagonal = tile_at.row == tile_at.column;
  // Once as it is, once mirrored. A tile on the diagonal is its own mirror image, of which the lower part counts.
  for (int side = 0; side < (diagonal ? 1 : 2); ++side) {
    const int64_t first_row = (side == 0 ? tile_at.row : tile_at.column) - start;
    const int64_t first_column = (side == 0 ? tile_at.column : tile_at.row) - start;
    const int row_begin = static_cast<int>(first_row < 0 ? -first_row : 0);
    const int row_end = static_cast<int>(order - first_row < kGramTile ? order - first_row : kGramTile);
    const int column_begin = static_cast<int>(first_column < 0 ? -first_column : 0);
    const int column_end = static_cast<int>(order - first_column < kGramTile ? order - first_column : kGramTile);
    const int64_t first = matrix + first_row * order + first_column;
#pragma unroll 4
    for (int i = 0; i < kGramTile / kGramWarps; ++i) {
      const int r = warp + i * kGramWarps;
#pragma unroll
      for (int c = lane; c < kGramTile; c += 32) {
        const bool mirrored = side == 1 || (diagonal && r < c);
        const int at = mirrored ? staged(c, r) : staged(r, c);
        const double re = tile[at];
        const double im = Kind::planes == 1 || (diagonal && r == c) ? 0.0 : tile[kGramTile * kGramTile + at];
        if (r >= row_begin && r < row_end && c >= column_begin && c < column_end)
          write<Kind>(gram, to_float32, first + r * order + c, re, mirrored ? -im : im);
      }
    }
  }
}

// What a block works on. It lives in shared memory, so that registers are left to the products.
struct TileTask {
  SharedMatrix matrix;
  ProductTile tile;
  int64_t first, last;  // inner starts of the group
};

__device__ void find_task(const int64_t* tables, int matrix_count, int64_t number, TileTask* task) {
  const SharedMatrix* matrices = reinterpret_cast<const SharedMatrix*>(tables);
  int low = 0, high = matrix_count - 1;  // the last matrix whose tasks do not begin behind this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (matrices[middle].tiles_before <= number)
      low = middle;
    else
      high = middle - 1;
  }
  task->matrix = matrices[low];
  const int64_t local = number - task->matrix.tiles_before, count = task->matrix.tile_count;
  const InnerGroup group = reinterpret_cast<const InnerGroup*>(tables + task->matrix.groups)[local / count];
  task->tile = reinterpret_cast<const ProductTile*>(tables + task->matrix.tiles)[local % count];
  task->first = group.begin;
  task->last = group.end - 1;
}

// grid: any number of blocks, which take the tasks in turn. tables: SharedMatrix[matrix_count] and the lists that they
// name. sums: (blocks, sums_per_block), scratch, as many tiles as there are starts in a group but the last, each
// (planes, kSumsPerThread, kGramThreads). gram: (windows, order, order). Blocks do not wait for each other: a block has
// scratch of its own, and every element of a Gram matrix comes from one task.
template <typename In, typename Kind>
__global__ void __launch_bounds__(kGramThreads, Kind::blocks_per_processor)
    shared_gram_kernel(const int64_t* __restrict__ tables, int matrix_count, int64_t tasks, int64_t order,
                       bool to_float32, double* __restrict__ sums, int64_t sums_per_block, void* __restrict__ gram) {
  using Product = TileProduct<In, Kind>;
  constexpr int64_t sum_size = Kind::planes * kGramTile * kGramTile;
  extern __shared__ __align__(16) double shared_memory[];
  __shared__ TileTask task;

  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) find_task(tables, matrix_count, i, &task);
    __syncthreads();
    typename Product::Sums sum = {};
    // Backward for the starts before the last, in descending order, then forward for all of them in ascending order.
    const int count = static_cast<int>(task.last - task.first) + 1;
    for (int piece = 1 - count; piece < count; ++piece) {
      const bool backward = piece < 0;
      {
        const int64_t* starts = tables + task.matrix.inner_starts + task.first;
        const int64_t inner = task.matrix.inner;
        const int64_t begin = backward     ? starts[-1 - piece]
                              : piece == 0 ? starts[count - 1]
                                           : starts[piece - 1] + inner;
        const int64_t end = backward ? starts[-piece] : starts[piece] + inner;
        if (piece == 0) Product::clear(sum);
        const Product product(task.matrix.data, task.matrix.vector_stride, task.matrix.element_stride,
                              task.matrix.vectors, task.tile.row, task.tile.column);
        product.add(begin, end, shared_memory, sum);
      }
      const int at = backward ? -1 - piece : piece;
      double* kept = sums + blockIdx.x * sums_per_block + at * sum_size + threadIdx.x;
      if (backward) {
        Product::for_each(sum, [&](int n, int, int, double re, double im) {
          kept[n * kGramThreads] = re;
          if (Kind::planes == 2) kept[(kSumsPerThread + n) * kGramThreads] = im;
        });
        continue;
      }
      const bool add = piece + 1 < count;
      Product::for_each(sum, [&](int n, int row, int column, double re, double im) {
        if (add) re += kept[n * kGramThreads];
        shared_memory[staged(row, column)] = re;
        if (Kind::planes == 2) {
          if (add) im += kept[(kSumsPerThread + n) * kGramThreads];
          shared_memory[kGramTile * kGramTile + staged(row, column)] = im;
        }
      });
      __syncthreads();
      for (int64_t v = task.tile.begin; v < task.tile.end; ++v) {
        const int64_t window = tables[task.matrix.windows + v * task.matrix.inner_count + task.first + at];
        if (window >= 0)
          write_window<Kind>(shared_memory, task.tile, tables[task.matrix.vector_starts + v], order, to_float32, gram,
                             (task.matrix.first_gram + window) * order * order);
      }
      __syncthreads();
    }
  }
}

template <typename In, typename Kind>
void launch(const GramPlan& plan, int64_t order, bool to_float32, const int64_t* tables, double* sums, void* gram,
            cudaStream_t stream) {
  const auto kernel = shared_gram_kernel<In, Kind>;
  constexpr int shared_bytes = TileProduct<In, Kind>::shared_bytes;
  static_assert(shared_bytes >= Kind::planes * kGramTile * kGramTile * static_cast<int>(sizeof(double)));
  FARMS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int64_t sums_per_block = plan.sum_bytes / plan.blocks / static_cast<int64_t>(sizeof(double));
  kernel<<<static_cast<unsigned>(plan.blocks), kGramThreads, shared_bytes, stream>>>(
      tables, static_cast<int>(plan.matrices), plan.tiles, order, to_float32, sums, sums_per_block, gram);
  FARMS_LAUNCH_CHECK();
}

// Blocks that run at a time.
int64_t workers(DType in) {
  int device = 0, processors = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  FARMS_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return processors * (is_complex(in) ? ComplexProducts::blocks_per_processor : RealProducts::blocks_per_processor);
}

// Bytes of an element of a sum.
int64_t sum_bytes_per_element(DType in) { return static_cast<int64_t>(item_size(gram_dtype(in, DType::f64))); }

// Appends lists to the tables, each grid's but once.
class Tables {
 public:
  explicit Tables(size_t matrices) : values_(matrices * sizeof(SharedMatrix) / sizeof(int64_t)) {}

  void set(size_t index, const SharedMatrix& matrix) {
    const int64_t* from = reinterpret_cast<const int64_t*>(&matrix);
    std::copy(from, from + sizeof(SharedMatrix) / sizeof(int64_t),
              values_.begin() + index * sizeof(SharedMatrix) / sizeof(int64_t));
  }

  int64_t append(const std::vector<int64_t>& list) {
    const int64_t at = static_cast<int64_t>(values_.size());
    values_.insert(values_.end(), list.begin(), list.end());
    return at;
  }

  std::vector<int64_t> take() { return std::move(values_); }

 private:
  std::vector<int64_t> values_;
};

std::vector<int64_t> tiles_of(const SharedGrid& grid) {
  std::vector<int64_t> tiles;
  const std::vector<int64_t>& starts = grid.vector_starts;
  for (const BandPanel& panel : grid.panels)
    for (int64_t row = panel.begin; row < panel.end; row += kGramTile) {
      const auto begin = std::upper_bound(starts.begin(), starts.end(), row - grid.order);
      const auto end = std::lower_bound(starts.begin(), starts.end(), panel.begin + kGramTile);
      tiles.insert(tiles.end(), {row, panel.begin, begin - starts.begin(), end - starts.begin()});
    }
  return tiles;
}

// Windows that have no part in any sharing go along as grids of one.
struct Part {
  int64_t begin;
  int64_t offset;
  std::shared_ptr<const SharedGrid> grid;
};

std::vector<Part> parts_of(const Window* windows, const std::vector<WindowRun>& runs) {
  std::vector<Part> parts;
  for (const WindowRun& run : runs) {
    if (run.grid != nullptr) {
      parts.push_back({run.begin, run_offset(windows, run), run.grid});
      continue;
    }
    const Window& first = windows[run.begin];
    const auto grid = lone_grid(first.rows, first.columns, kGramTile);
    for (int64_t b = run.begin; b < run.begin + run.count; ++b)
      parts.push_back({b, run_offset(windows, {b, 1, nullptr}), grid});
  }
  return parts;
}

GramPlan plan_shared(const Window* windows, const std::vector<Part>& parts, DType in) {
  GramPlan plan;
  plan.shares = true;
  plan.matrices = static_cast<int64_t>(parts.size());
  Tables tables(parts.size());
  SharedMatrix matrix{};
  const SharedGrid* before = nullptr;
  int64_t sums = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const SharedGrid& grid = *parts[p].grid;
    const Window& window = windows[parts[p].begin];
    if (&grid != before) {
      const std::vector<int64_t> tiles = tiles_of(grid);
      std::vector<int64_t> groups;
      for (const InnerGroup& group : grid.groups) groups.insert(groups.end(), {group.begin, group.end});
      matrix.tiles = tables.append(tiles);
      matrix.tile_count = static_cast<int64_t>(tiles.size() * sizeof(int64_t) / sizeof(ProductTile));
      matrix.groups = tables.append(groups);
      matrix.vector_starts = tables.append(grid.vector_starts);
      matrix.inner_starts = tables.append(grid.inner_starts);
      matrix.inner_count = static_cast<int64_t>(grid.inner_starts.size());
      matrix.windows = tables.append(grid.windows);
      sums = std::max(sums, grid.largest_group() - 1);
      before = &grid;
    }
    matrix.data = static_cast<const char*>(window.matrix) + parts[p].offset * static_cast<int64_t>(item_size(in));
    matrix.vector_stride = grid.vectors_are_rows ? window.row_stride : window.column_stride;
    matrix.element_stride = grid.vectors_are_rows ? window.column_stride : window.row_stride;
    matrix.vectors = grid.extent();
    matrix.inner = grid.inner;
    matrix.first_gram = parts[p].begin;
    matrix.tiles_before = plan.tiles;
    tables.set(p, matrix);
    plan.tiles += matrix.tile_count * static_cast<int64_t>(grid.groups.size());
  }
  plan.tables = tables.take();
  plan.blocks = std::min(plan.tiles, workers(in));
  plan.sum_bytes = plan.blocks * sums * kGramTile * kGramTile * sum_bytes_per_element(in);
  return plan;
}

}  // namespace

GramPlan plan_grams_cuda(const Window* windows, int64_t count, DType in, bool either_side, int64_t memory) {
  SharingCosts costs = is_complex(in) ? kCudaComplexSharing : kCudaSharing;
  costs.workers = workers(in);
  GramPlan plan;
  bool long_windows = false;
  for (int64_t b = 0; b < count; ++b) {
    const auto [order, inner] = std::minmax(windows[b].rows, windows[b].columns);
    plan.longest = std::max(plan.longest, inner);
    long_windows = long_windows || inner > summed_depth(order);
  }
  // A block that shares has no room for the sums of pieces.
  if (!long_windows) {
    const std::vector<WindowRun> runs =
        plan_gram_sharing(windows, count, either_side, sum_bytes_per_element(in), memory, costs);
    if (std::any_of(runs.begin(), runs.end(), [](const WindowRun& run) { return run.grid != nullptr; })) {
      GramPlan shared = plan_shared(windows, parts_of(windows, runs), in);
      if (shared.workspace_bytes() <= memory) return shared;
    }
  }
  plan.matrices = count;
  for (int64_t b = 0; b < count; ++b) {
    const WindowView view = view_of(windows[b], in);
    plan.tables.insert(plan.tables.end(),
                       {reinterpret_cast<int64_t>(view.data), view.vector_stride, view.element_stride, view.inner});
  }
  return plan;
}

void form_grams_cuda(const GramPlan& plan, int64_t order, DType in, DType precision, void* workspace, void* gram,
                     void* stream) {
  int64_t* tables = static_cast<int64_t*>(workspace);
  store_table_cuda(plan.tables.data(), static_cast<int64_t>(plan.tables.size()), tables, stream);
  if (!plan.shares) {
    static_assert(sizeof(WindowView) == 4 * sizeof(int64_t));
    window_gram_cuda(static_cast<const WindowView*>(workspace), plan.matrices, order, plan.longest, in, precision, gram,
                     stream);
    return;
  }
  double* sums = reinterpret_cast<double*>(tables + plan.tables.size());
  dispatch_weight(in, [&](auto element, auto kind) {
    launch<decltype(element), decltype(kind)>(plan, order, precision == DType::f32, tables, sums, gram,
                                              static_cast<cudaStream_t>(stream));
  });
}

}  // namespace farms_fast
