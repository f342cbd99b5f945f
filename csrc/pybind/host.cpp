// Python bindings of the host types that know nothing of torch. A module of its own: pybind11 needs the full Python
// API, and the ops' library keeps to the limited one.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/host/cusolver_workspace.h"
#include "csrc/host/gram_sharing.h"
#include "csrc/host/window_grid.h"

#ifndef FARMS_FAST_CUDA_ARCHITECTURES
#define FARMS_FAST_CUDA_ARCHITECTURES ""
#endif
#ifndef FARMS_FAST_CUDA_VERSION
#define FARMS_FAST_CUDA_VERSION ""
#endif
#ifndef FARMS_FAST_TORCH_TARGET
#define FARMS_FAST_TORCH_TARGET ""
#endif

namespace py = pybind11;
using farms_fast::WindowGrid;

namespace {

// The rows of the ops' window table for every entry of a stack, entry by entry, row start by row start.
py::array_t<int64_t> window_table(const WindowGrid& grid, int64_t weight, int64_t entries) {
  py::array_t<int64_t> table({static_cast<py::ssize_t>(entries * grid.count()), static_cast<py::ssize_t>(6)});
  int64_t* out = table.mutable_data();
  for (int64_t entry = 0; entry < entries; ++entry)
    for (const int64_t row : grid.row_starts)
      for (const int64_t column : grid.column_starts)
        for (const int64_t value : {weight, entry, row, column, grid.rows, grid.columns}) *out++ = value;
  return table;
}

// How the ops would share the work of a window table's Gram matrices, run by run.
py::list gram_sharing(const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& table,
                      const std::string& device, bool either_side, bool complex, int64_t memory) {
  using namespace farms_fast;
  if (table.ndim() != 2 || table.shape(1) != 6)
    throw py::value_error("table: expected an int64 array of shape (windows, 6), got another shape");
  if (device != "cpu" && device != "cuda") throw py::value_error("device: expected cpu or cuda, got " + device);
  std::vector<Window> windows;
  const auto at = table.unchecked<2>();
  for (py::ssize_t b = 0; b < table.shape(0); ++b)
    windows.push_back({at(b, 0), at(b, 1), nullptr, 1, 1, at(b, 2), at(b, 3), at(b, 4), at(b, 5)});
  const SharingCosts& costs = device == "cpu" ? kCpuSharing : complex ? kCudaComplexSharing : kCudaSharing;
  SharingCosts products = costs;  // multiply-adds alone
  products.whole_tiles = false;
  products.step = 1;
  products.piece = 0;
  const int64_t item = complex ? 16 : 8;
  py::list runs;
  for (const WindowRun& run :
       plan_gram_sharing(windows.data(), static_cast<int64_t>(windows.size()), either_side, item, memory, costs)) {
    const Window& first = windows[static_cast<size_t>(run.begin)];
    const int64_t order = std::min(first.rows, first.columns), inner = std::max(first.rows, first.columns);
    const int64_t alone =
        run.count * inner * sharing::band_area(sharing::band_panels({0}, order, costs.tile), products);
    py::dict told;
    told["begin"] = run.begin;
    told["windows"] = run.count;
    told["alone"] = alone;
    told["shared"] = run.grid != nullptr;
    if (run.grid != nullptr) {
      const SharedGrid& grid = *run.grid;
      int64_t depth = 0;
      py::list groups;
      for (const InnerGroup& group : grid.groups) {
        depth += sharing::group_depth(grid.inner_starts, grid.inner, group, products);
        groups.append(
            std::vector<int64_t>(grid.inner_starts.begin() + group.begin, grid.inner_starts.begin() + group.end));
      }
      py::list panels;
      for (const BandPanel& panel : grid.panels) panels.append(py::make_tuple(panel.begin, panel.width, panel.end));
      told["vectors"] = grid.vectors_are_rows ? "rows" : "columns";
      told["vector_starts"] = grid.vector_starts;
      told["groups"] = groups;
      told["panels"] = panels;
      told["products"] = depth * sharing::band_area(grid.panels, products);
      told["kept_bytes"] = sharing::kept_bytes(grid, item, costs);
    }
    runs.append(told);
  }
  return runs;
}

py::dict build_settings() {
  py::dict settings;
  settings["compiler"] = "g++ " __VERSION__;
  settings["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  settings["cuda_toolkit"] = FARMS_FAST_CUDA_VERSION;
  settings["cuda_architectures"] = FARMS_FAST_CUDA_ARCHITECTURES;
  settings["torch_target"] = FARMS_FAST_TORCH_TARGET;
  return settings;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host types of farms_fast: window grids and the settings of the build.";
  py::class_<WindowGrid>(m, "WindowGrid", "Windows of one size at every pair of a row start and a column start.")
      .def_readonly("rows", &WindowGrid::rows, "Rows of a window.")
      .def_readonly("columns", &WindowGrid::columns, "Columns of a window.")
      .def_readonly("row_starts", &WindowGrid::row_starts, "First rows of the windows, ascending.")
      .def_readonly("column_starts", &WindowGrid::column_starts, "First columns of the windows, ascending.")
      .def_property_readonly("count", &WindowGrid::count, "Number of windows.")
      .def_property_readonly("order", &WindowGrid::order, "Order k of the Gram matrices: the shorter side.")
      .def("table", &window_table, py::arg("weight") = 0, py::arg("entries") = 1,
           "int64 array (entries * count, 6): weight, entry, row, column, rows, columns of every window of a stack.")
      .def("__repr__", [](const WindowGrid& grid) {
        return "WindowGrid(" + std::to_string(grid.row_starts.size()) + " x " +
               std::to_string(grid.column_starts.size()) + " windows of " + std::to_string(grid.rows) + " x " +
               std::to_string(grid.columns) + ")";
      });
  m.def("fixed_aspect_grid", &farms_fast::fixed_aspect_grid, py::arg("matrix_rows"), py::arg("matrix_columns"),
        py::arg("rows"), py::arg("q"), py::arg("per_dim"));
  m.def("published_grid", &farms_fast::published_grid, py::arg("matrix_rows"), py::arg("matrix_columns"),
        py::arg("rows"), py::arg("q"), py::arg("per_dim"));
  m.def("full_grid", &farms_fast::full_grid, py::arg("matrix_rows"), py::arg("matrix_columns"));
  m.def("gram_sharing", &gram_sharing, py::arg("table"), py::arg("device"), py::arg("either_side") = true,
        py::arg("complex") = false, py::arg("memory") = std::numeric_limits<int64_t>::max(),
        "How the ops share the work of the Gram matrices of a window table in float64: a dict for each run of "
        "windows of one matrix, with the multiply-adds of all windows alone and of the shared products.");
  m.def("needs_zeroed_workspace", &farms_fast::needs_zeroed_workspace, py::arg("version"),
        "Whether that cuSOLVER, 1000 * major + 100 * minor + patch, wants its workspace zeroed.");
  m.def("build_settings", &build_settings, "Compiler, CUDA toolkit, architectures and torch ABI target of the build.");
}
