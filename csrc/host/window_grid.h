// Where the windows of one matrix start: host arithmetic only, no torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

namespace farms_fast {

// Every row start meets every column start; all windows have the same size.
struct WindowGrid {
  int64_t rows;
  int64_t columns;
  std::vector<int64_t> row_starts;     // ascending, distinct
  std::vector<int64_t> column_starts;  // ascending, distinct

  int64_t count() const { return static_cast<int64_t>(row_starts.size() * column_starts.size()); }
  int64_t order() const { return std::min(rows, columns); }
};

// Evenly spread starts, the first at 0 and the last at the far edge, enough of them to leave nothing uncovered.
inline std::vector<int64_t> spread_starts(int64_t extent, int64_t window, int64_t per_dim) {
  const int64_t slack = extent - window;
  if (slack == 0) return {0};
  const int64_t count = std::max(per_dim, (extent + window - 1) / window);
  // A single start is asked for and one window does not cover the matrix: its centre stands for it.
  if (per_dim == 1) return {static_cast<int64_t>(std::nearbyint(static_cast<double>(slack) / 2))};
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < count; ++i) {
    // nearbyint rounds halves to even in the default rounding mode.
    const auto start =
        static_cast<int64_t>(std::nearbyint(static_cast<double>(i * slack) / static_cast<double>(count - 1)));
    if (starts.empty() || start != starts.back()) starts.push_back(start);
  }
  return starts;
}

// Starts of the published code: a fixed step, rounded down, which may stop short of the far edge.
inline std::vector<int64_t> stepped_starts(int64_t extent, int64_t window, int64_t per_dim) {
  const int64_t slack = std::max<int64_t>(extent - window, 0);
  const int64_t step = per_dim > 1 ? std::max<int64_t>(1, slack / (per_dim - 1)) : std::max<int64_t>(1, slack);
  const int64_t count = std::min(per_dim, std::max<int64_t>(1, slack / step + 1));
  std::set<int64_t> starts;
  for (int64_t i = 0; i < count; ++i) starts.insert(std::min(i * step, slack));
  return {starts.begin(), starts.end()};
}

// A matrix smaller than the window shrinks it and keeps q. A size of 0 means that no window of this q fits.
inline WindowGrid fixed_aspect_grid(int64_t matrix_rows, int64_t matrix_columns, int64_t rows, double q,
                                    int64_t per_dim) {
  const auto fitting = static_cast<int64_t>(std::min(std::floor(static_cast<double>(matrix_columns) / q), 9e18));
  const int64_t m = std::min({rows, matrix_rows, fitting});
  const int64_t n = std::min(matrix_columns, static_cast<int64_t>(std::nearbyint(static_cast<double>(m) * q)));
  if (m <= 0 || n <= 0) return {m < 0 ? 0 : m, n < 0 ? 0 : n, {}, {}};
  return {m, n, spread_starts(matrix_rows, m, per_dim), spread_starts(matrix_columns, n, per_dim)};
}

// The published window: its columns may be more than the matrix has, and are cut there.
inline WindowGrid published_grid(int64_t matrix_rows, int64_t matrix_columns, int64_t rows, double q, int64_t per_dim) {
  const int64_t m = std::min({rows, matrix_rows, matrix_columns});
  const int64_t n = std::min(matrix_columns, static_cast<int64_t>(std::min(static_cast<double>(m) * q, 9e18)));
  if (m <= 0 || n <= 0) return {m < 0 ? 0 : m, n < 0 ? 0 : n, {}, {}};
  return {m, n, stepped_starts(matrix_rows, m, per_dim), stepped_starts(matrix_columns, n, per_dim)};
}

inline WindowGrid full_grid(int64_t matrix_rows, int64_t matrix_columns) {
  return {matrix_rows, matrix_columns, {0}, {0}};
}

}  // namespace farms_fast
