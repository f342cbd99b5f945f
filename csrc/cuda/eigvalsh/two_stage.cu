#include "csrc/cuda/eigvalsh/two_stage.h"

#include "csrc/cuda/check.h"
#include "csrc/cuda/current_device.h"
#include "csrc/cuda/eigvalsh/tridiagonal.h"

namespace farms_fast {
namespace {

__global__ void widen_kernel(const float* __restrict__ in, int64_t count, double* __restrict__ out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < count) out[i] = in[i];
}

// grid: (columns by 256, rows, matrices), of the real matrix. complex_matrices: (batch, order, order, 2). out: (batch,
// 2 order, 2 order).
template <typename Real>
__global__ void expand_kernel(const Real* __restrict__ complex_matrices, int order, double* __restrict__ out) {
  const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), row = static_cast<int>(blockIdx.y);
  if (column >= 2 * order) return;
  const int64_t at = (static_cast<int64_t>(blockIdx.z) * order + row / 2) * order + column / 2;
  const bool imaginary = (row ^ column) & 1;
  double value = complex_matrices[2 * at + imaginary];
  if (imaginary) value = row / 2 == column / 2 ? 0.0 : row & 1 ? value : -value;
  out[(static_cast<int64_t>(blockIdx.z) * 2 * order + row) * 2 * order + column] = value;
}

unsigned blocks_of(int64_t count) { return static_cast<unsigned>((count + 255) / 256); }

// Matrices of other types than float64 as real ones of it.
void widen(const void* gram, int64_t batch, int order, DType dtype, double* out, cudaStream_t stream) {
  if (dtype == DType::f64) return;
  const int64_t count = batch * order * order;
  const dim3 grid(blocks_of(2 * order), static_cast<unsigned>(2 * order), static_cast<unsigned>(batch));
  if (dtype == DType::f32)
    widen_kernel<<<blocks_of(count), 256, 0, stream>>>(static_cast<const float*>(gram), count, out);
  else if (dtype == DType::c64)
    expand_kernel<<<grid, 256, 0, stream>>>(static_cast<const float*>(gram), order, out);
  else
    expand_kernel<<<grid, 256, 0, stream>>>(static_cast<const double*>(gram), order, out);
  FARMS_LAUNCH_CHECK();
}

void solve(void* gram, int64_t batch, int64_t order, DType dtype, void* workspace, void* evals, int* failed,
           cudaStream_t stream) {
  const int matrices = static_cast<int>(batch), n = static_cast<int>(order) * reals(dtype);
  const CudaDevice device = current_device();
  const TwoStageWorkspace layout = lay_out_two_stage(workspace, batch, n, dtype);
  double* matrix = dtype == DType::f64 ? static_cast<double*>(gram) : layout.matrices;
  widen(gram, batch, static_cast<int>(order), dtype, matrix, stream);
  FARMS_CUDA_CHECK(cudaMemsetAsync(failed, 0, batch * sizeof(int), stream));
  FARMS_CUDA_CHECK(cudaMemsetAsync(layout.panels.done, 0, batch * sizeof(unsigned), stream));
  for (int column = 0; has_panel(n, column); column += kWideBand) {
    panel_qr(matrix, matrices, n, column, layout.panels.v[is_second_panel(column)], layout.panels.t, device, stream);
    apply_panel(matrix, matrices, n, column + kWideBand, layout.panels, device, stream);
  }
  extract_band(matrix, matrices, n, layout.band, stream);
  narrow_band(layout.band, matrices, n, layout.flags, device, stream);
  chase_bulges(layout.band, matrices, n, layout.spill, layout.flags, layout.diagonal, layout.off_diagonal, device,
               stream);
  tridiagonal_eigvalsh(layout.diagonal, layout.off_diagonal, batch, n, reals(dtype),
                       is_double(dtype) ? DType::f64 : DType::f32, evals, stream);
}

}  // namespace

const CudaSolver& two_stage() {
  static const InPlaceSolver in_place{two_stage_workspace_bytes, solve};
  static const CudaSolver solver{kTwoStage, nullptr, &in_place};
  return solver;
}

}  // namespace farms_fast
