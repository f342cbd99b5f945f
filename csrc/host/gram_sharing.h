// Which windows share the work of their Gram matrices, and how: host arithmetic only, no torch.
//
// Windows of one size on one matrix meet in a grid: starts along their vectors, starts along the vectors' elements (the
// inner axis). A Gram matrix is a diagonal block of the sum, over the elements of the window, of all vectors' products,
// so that windows with the same inner start share that sum, of which only a band is needed: the pairs of vectors that
// some window holds both of. Along the inner axis the starts fall into groups whose windows all hold the last start of
// the group. From there backward to a window's start and forward to its end, sums grow by one piece from a window to
// the next, and the two of them make up the window. Nothing is ever subtracted, and nothing outside of a window gets
// into it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace farms_fast {

// A window of a matrix: which matrix of which stack, its first element, strides in elements, and where in it the window
// is.
struct Window {
  int64_t weight, entry;
  const void* matrix;
  int64_t row_stride, column_stride;
  int64_t row, column, rows, columns;
};

// `width` vectors from `begin` on, and all from `begin` to `end` that share a window with one of them.
struct BandPanel {
  int64_t begin, width, end;
};

// Inner starts [begin, end).
struct InnerGroup {
  int64_t begin, end;
};

// Positions count from the first vector and the first element of all windows.
struct SharedGrid {
  int64_t order;  // vectors of a window
  int64_t inner;  // elements of a vector
  bool vectors_are_rows;
  std::vector<int64_t> vector_starts, inner_starts;  // ascending, distinct
  std::vector<int64_t> windows;                      // [vector start][inner start]: index in the run, -1 for none
  std::vector<BandPanel> panels;
  std::vector<InnerGroup> groups;

  int64_t extent() const { return vector_starts.back() + order; }
  int64_t largest_group() const {
    int64_t largest = 0;
    for (const InnerGroup& group : groups) largest = std::max(largest, group.end - group.begin);
    return largest;
  }
};

// Windows one after the other in the table. Without a grid each is on its own.
struct WindowRun {
  int64_t begin, count;
  std::shared_ptr<const SharedGrid> grid;
};

// What a device takes for the parts of the work: in the time that a lone window's product takes for one element of the
// vectors, times every pair of the vectors of a tile.
struct SharingCosts {
  int64_t tile;         // vectors of a panel
  bool whole_tiles;     // a tile at the edge costs as much as any other
  int64_t step;         // elements that are taken together
  int64_t piece;        // beginning a product
  double slower;        // times a lone window's, for a shared product
  double snapshot;      // storing a sum and fetching it again
  double write;         // writing the sum of a lone window, or what it takes longer than for the product alone
  double shared_write;  // writing a shared sum to one of its windows
  int64_t workers;      // products that run at a time; 0 where the longest of them does not matter
  // Sums kept at a time are largest_group() - 1 for each worker, or largest_group() for the whole band.
  bool keeps_band;
};

// Fitted to measurements of an H200 (benchmarks/NOTES.md), a lone window's products at 48.5 TFLOP/s.
constexpr SharingCosts kCudaSharing{64, true, 16, 0, 1.27, 134, 64, 132, 396, false};
constexpr SharingCosts kCudaComplexSharing{64, true, 16, 0, 1.6, 100, 32, 100, 264, false};
// For a core at 30 GFLOP/s and 10 GB/s.
constexpr SharingCosts kCpuSharing{128, false, 1, 32, 1, 40, 0, 40, 0, true};

namespace sharing {

inline std::vector<BandPanel> band_panels(const std::vector<int64_t>& starts, int64_t order, int64_t tile) {
  std::vector<BandPanel> panels;
  const int64_t extent = starts.back() + order;
  size_t next = 0;
  for (int64_t begin = 0; begin < extent; begin += tile) {
    while (next < starts.size() && starts[next] < begin + tile) ++next;
    const int64_t end = starts[next - 1] + order;
    if (end > begin) panels.push_back({begin, std::min(tile, end - begin), end});
  }
  return panels;
}

// As few groups as can be of at most `most` starts, and as even as they can be.
inline std::vector<InnerGroup> inner_groups(const std::vector<int64_t>& starts, int64_t inner, int64_t most) {
  const int64_t count = static_cast<int64_t>(starts.size());
  const auto cut = [&](int64_t limit) {
    std::vector<InnerGroup> groups{{0, 0}};
    for (int64_t j = 0; j < count; ++j) {
      const int64_t first = groups.back().begin;
      if (j - first >= limit || starts[j] - starts[first] >= inner) groups.push_back({j, j});
      groups.back().end = j + 1;
    }
    return groups;
  };
  const std::vector<InnerGroup> fewest = cut(most);
  const int64_t number = static_cast<int64_t>(fewest.size());
  const std::vector<InnerGroup> even = cut((count + number - 1) / number);
  return even.size() == fewest.size() ? even : fewest;
}

inline int64_t panel_area(const BandPanel& panel, const SharingCosts& costs) {
  if (!costs.whole_tiles) return (panel.end - panel.begin) * panel.width;
  return (panel.end - panel.begin + costs.tile - 1) / costs.tile * costs.tile * costs.tile;
}

inline int64_t band_area(const std::vector<BandPanel>& panels, const SharingCosts& costs) {
  int64_t area = 0;
  for (const BandPanel& panel : panels) area += panel_area(panel, costs);
  return area;
}

inline int64_t piece_depth(int64_t elements, const SharingCosts& costs) {
  return (elements + costs.step - 1) / costs.step * costs.step + costs.piece;
}

// Elements of a group's products, for one tile.
inline int64_t group_depth(const std::vector<int64_t>& starts, int64_t inner, const InnerGroup& group,
                           const SharingCosts& costs) {
  int64_t depth = piece_depth(starts[group.begin] + inner - starts[group.end - 1], costs);
  for (int64_t j = group.begin + 1; j < group.end; ++j) depth += 2 * piece_depth(starts[j] - starts[j - 1], costs);
  return depth;
}

// Area of all vector starts' windows in the tiles of the band that they meet.
inline int64_t written_area(const SharedGrid& grid, const SharingCosts& costs) {
  if (!costs.whole_tiles)
    return static_cast<int64_t>(grid.vector_starts.size()) * band_area(band_panels({0}, grid.order, costs.tile), costs);
  int64_t tiles = 0;
  for (const int64_t start : grid.vector_starts) {
    const int64_t first = start / costs.tile, last = (start + grid.order - 1) / costs.tile;
    tiles += (last - first + 1) * (last - first + 2) / 2;
  }
  return tiles * costs.tile * costs.tile;
}

struct Estimate {
  double work;     // of all workers
  double longest;  // of one worker's longest task, when the others leave it the memory

  double time(int64_t runs, const SharingCosts& costs) const {
    if (costs.workers == 0) return work;
    return work * static_cast<double>(runs) / static_cast<double>(costs.workers) + longest;
  }
};

inline Estimate estimate_alone(int64_t count, int64_t order, int64_t inner, const SharingCosts& costs) {
  const double depth = static_cast<double>(piece_depth(inner, costs)) + costs.write;
  const double area = static_cast<double>(band_area(band_panels({0}, order, costs.tile), costs));
  return {static_cast<double>(count) * area / static_cast<double>(costs.tile * costs.tile) * depth, depth};
}

inline Estimate estimate_shared(const SharedGrid& grid, const SharingCosts& costs) {
  constexpr double alone = 0.25;  // of the time that a worker's memory accesses take among all others'
  const double tile = static_cast<double>(costs.tile * costs.tile);
  const double band = static_cast<double>(band_area(grid.panels, costs)) / tile;
  const double written = static_cast<double>(written_area(grid, costs)) / tile * costs.shared_write;
  const double writes = static_cast<double>(grid.vector_starts.size()) * costs.shared_write;
  Estimate sum{0, 0};
  for (const InnerGroup& group : grid.groups) {
    const double size = static_cast<double>(group.end - group.begin);
    const double depth = costs.slower * static_cast<double>(group_depth(grid.inner_starts, grid.inner, group, costs));
    const double snapshots = (size - 1) * costs.snapshot;
    sum.work += band * (depth + snapshots) + size * written;
    sum.longest = std::max(sum.longest, depth + alone * (snapshots + size * writes));
  }
  return sum;
}

// Bytes of the sums that are kept, for numbers of `item` bytes.
inline int64_t kept_bytes(const SharedGrid& grid, int64_t item, const SharingCosts& costs) {
  if (!costs.keeps_band) return (grid.largest_group() - 1) * costs.workers * costs.tile * costs.tile * item;
  int64_t elements = 0;  // of the vectors, packed for one group
  for (const InnerGroup& group : grid.groups)
    elements = std::max(elements, grid.inner_starts[group.end - 1] - grid.inner_starts[group.begin] + grid.inner);
  return (grid.largest_group() * band_area(grid.panels, costs) + grid.extent() * elements) * item;
}

inline std::vector<int64_t> distinct(std::vector<int64_t> values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

// The grid of a run of windows, no vectors' side chosen yet: starts of rows and columns from the run's first, and which
// window is at which of them. Empty where windows are too sparse for a grid, or one is there twice.
struct Lattice {
  std::vector<int64_t> rows, columns;
  std::vector<int64_t> windows;

  bool operator==(const Lattice& other) const {
    return rows == other.rows && columns == other.columns && windows == other.windows;
  }
};

inline Lattice lattice_of(const Window* windows, int64_t count) {
  Lattice lattice;
  for (int64_t b = 0; b < count; ++b) {
    lattice.rows.push_back(windows[b].row);
    lattice.columns.push_back(windows[b].column);
  }
  lattice.rows = distinct(std::move(lattice.rows));
  lattice.columns = distinct(std::move(lattice.columns));
  const int64_t across = static_cast<int64_t>(lattice.columns.size());
  const int64_t positions = static_cast<int64_t>(lattice.rows.size()) * across;
  if (positions > 4 * count) return {};
  lattice.windows.assign(static_cast<size_t>(positions), -1);
  for (int64_t b = 0; b < count; ++b) {
    const auto r = std::lower_bound(lattice.rows.begin(), lattice.rows.end(), windows[b].row) - lattice.rows.begin();
    const auto c =
        std::lower_bound(lattice.columns.begin(), lattice.columns.end(), windows[b].column) - lattice.columns.begin();
    int64_t& window = lattice.windows[static_cast<size_t>(r * across + c)];
    if (window >= 0) return {};
    window = b;
  }
  for (std::vector<int64_t>* starts : {&lattice.rows, &lattice.columns}) {
    const int64_t first = starts->front();
    for (int64_t& start : *starts) start -= first;
  }
  return lattice;
}

inline SharedGrid grid_of(const Lattice& lattice, int64_t rows, int64_t columns, bool vectors_are_rows) {
  SharedGrid grid{
      vectors_are_rows ? rows : columns, vectors_are_rows ? columns : rows, vectors_are_rows, {}, {}, {}, {}, {}};
  grid.vector_starts = vectors_are_rows ? lattice.rows : lattice.columns;
  grid.inner_starts = vectors_are_rows ? lattice.columns : lattice.rows;
  const size_t down = lattice.rows.size(), across = lattice.columns.size();
  grid.windows.resize(down * across);
  for (size_t r = 0; r < down; ++r)
    for (size_t c = 0; c < across; ++c)
      grid.windows[vectors_are_rows ? r * across + c : c * down + r] = lattice.windows[r * across + c];
  return grid;
}

// The fastest way to share, or none where every window on its own is faster still or nothing else fits into `memory`.
inline std::shared_ptr<const SharedGrid> best_grid(const Lattice& lattice, int64_t count, int64_t rows, int64_t columns,
                                                   bool either_side, int64_t runs, int64_t item, int64_t memory,
                                                   const SharingCosts& costs) {
  std::shared_ptr<const SharedGrid> best;
  double least = estimate_alone(count, std::min(rows, columns), std::max(rows, columns), costs).time(runs, costs);
  for (const bool vectors_are_rows : {true, false}) {
    const bool fewer = vectors_are_rows ? rows <= columns : columns < rows;
    if (!fewer && !(either_side && rows == columns)) continue;
    SharedGrid grid = grid_of(lattice, rows, columns, vectors_are_rows);
    grid.panels = band_panels(grid.vector_starts, grid.order, costs.tile);
    for (int64_t most = static_cast<int64_t>(grid.inner_starts.size());; most = (most + 1) / 2) {
      grid.groups = inner_groups(grid.inner_starts, grid.inner, most);
      const double time = estimate_shared(grid, costs).time(runs, costs);
      if (time < least && kept_bytes(grid, item, costs) <= memory) {
        least = time;
        best = std::make_shared<const SharedGrid>(grid);
      }
      if (most == 1) break;
    }
  }
  return best;
}

}  // namespace sharing

// A grid of one window.
inline std::shared_ptr<const SharedGrid> lone_grid(int64_t rows, int64_t columns, int64_t tile) {
  SharedGrid grid = sharing::grid_of({{0}, {0}, {0}}, rows, columns, rows <= columns);
  grid.panels = sharing::band_panels({0}, grid.order, tile);
  grid.groups = {{0, 1}};
  return std::make_shared<const SharedGrid>(std::move(grid));
}

// Runs of the table in its order. `either_side`: a square window's vectors may be its columns as well, for which the
// eigenvalues are the same. item: bytes of a number of the sums. memory: bytes for the sums of one run.
inline std::vector<WindowRun> plan_gram_sharing(const Window* windows, int64_t count, bool either_side, int64_t item,
                                                int64_t memory, const SharingCosts& costs) {
  std::vector<WindowRun> runs;
  for (int64_t b = 0; b < count; ++b) {
    const Window& window = windows[b];
    const Window* last = b > 0 ? &windows[b - 1] : nullptr;
    if (last == nullptr || last->weight != window.weight || last->entry != window.entry || last->rows != window.rows ||
        last->columns != window.columns)
      runs.push_back({b, 0, nullptr});
    ++runs.back().count;
  }
  // Stacks repeat one grid: what was found for the run before holds for the next of the same.
  sharing::Lattice before;
  int64_t rows = 0, columns = 0;
  std::shared_ptr<const SharedGrid> grid;
  for (WindowRun& run : runs) {
    if (run.count == 1) continue;
    const Window& first = windows[run.begin];
    sharing::Lattice lattice = sharing::lattice_of(windows + run.begin, run.count);
    if (lattice.windows.empty()) continue;
    if (rows != first.rows || columns != first.columns || !(lattice == before)) {
      grid = sharing::best_grid(lattice, run.count, first.rows, first.columns, either_side,
                                static_cast<int64_t>(runs.size()), item, memory, costs);
      before = std::move(lattice);
      rows = first.rows;
      columns = first.columns;
    }
    run.grid = grid;
  }
  return runs;
}

// The first element of the first vector of a run's windows, in elements from the matrix's first.
inline int64_t run_offset(const Window* windows, const WindowRun& run) {
  int64_t row = std::numeric_limits<int64_t>::max(), column = row;
  for (int64_t b = run.begin; b < run.begin + run.count; ++b) {
    row = std::min(row, windows[b].row);
    column = std::min(column, windows[b].column);
  }
  return row * windows[run.begin].row_stride + column * windows[run.begin].column_stride;
}

}  // namespace farms_fast
