// Gram matrices of windows. A window is `order` vectors (its rows, or its columns when those are fewer) of `inner`
// elements each, read in place from the weight; the Gram matrix is G[i][j] = sum_t v_i[t] * conj(v_j[t]).
#pragma once

#include <cstdint>

#include "csrc/dtype.h"
#include "csrc/host/gram_sharing.h"

namespace farms_fast {

// One window by itself. Strides are in elements of the weight's type.
struct WindowView {
  const void* data;
  int64_t vector_stride;
  int64_t element_stride;
  int64_t inner;
};

inline WindowView view_of(const Window& window, DType in) {
  const int64_t first = window.row * window.row_stride + window.column * window.column_stride;
  const char* data = static_cast<const char*>(window.matrix) + first * static_cast<int64_t>(item_size(in));
  if (window.rows <= window.columns) return {data, window.row_stride, window.column_stride, window.columns};
  return {data, window.column_stride, window.row_stride, window.rows};
}

// Elements of the vectors whose products may be added up one after the other. The error of such a sum grows with the
// root of their number, 0.2 root(n) 2^-52 of it as measured, and that of a matrix of sums with the root of its order;
// the bound on eigenvalues, 8 k 2^-52, leaves five times that here. Longer vectors are taken in pieces, whose sums are
// added up without loss.
constexpr int64_t summed_depth(int64_t order) { return 64 * order > 1024 ? 64 * order : 1024; }

// gram: (count, order, order), of type gram_dtype(in, precision); both triangles are written.
void window_gram_cpu(const Window* windows, int64_t count, int64_t order, DType in, DType precision, void* gram);

// Copies `count` words, in host memory and free to go when the call returns, to `table`, in device memory, on a stream
// (a cudaStream_t). Can be captured in a graph.
void store_table_cuda(const int64_t* words, int64_t count, void* table, void* stream);

// Gram matrices on a stream, each by itself, of windows in device memory, of at most `longest` elements a vector. Sums
// are taken in float64 whatever `precision`.
void window_gram_cuda(const WindowView* windows, int64_t count, int64_t order, int64_t longest, DType in,
                      DType precision, void* gram, void* stream);

}  // namespace farms_fast
