// Python bindings of the host types that know nothing of torch. A module of its own: pybind11 needs the full Python
// API, and the ops' library keeps to the limited one.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../host/window_grid.h"

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
  m.def("build_settings", &build_settings, "Compiler, CUDA toolkit, architectures and torch ABI target of the build.");
}
