// Gram matrices of windows. A window is `order` vectors (its rows, or its columns when those are fewer) of `inner`
// elements each, read in place from the weight; the Gram matrix is G[i][j] = sum_t v_i[t] * conj(v_j[t]).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace farms_fast {

// Strides are in elements of the weight's type.
struct WindowView {
  const void* data;
  int64_t vector_stride;
  int64_t element_stride;
  int64_t inner;
};

// gram: (count, order, order), of type gram_dtype(in, precision); both triangles are written.
void window_gram_cpu(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision, void* gram);

// Copies `windows`, in host memory and free to go when the call returns, to `table`, in device memory, on a stream (a
// cudaStream_t). Can be captured in a graph.
void store_window_views_cuda(const WindowView* windows, int64_t count, WindowView* table, void* stream);

// window_gram_cpu on a stream, for windows in device memory. Sums are taken in float64 whatever `precision`.
void window_gram_cuda(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision, void* gram,
                      void* stream);

}  // namespace farms_fast
