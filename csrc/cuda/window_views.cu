// Window views travel to the device as kernel parameters: no host buffer has to outlive the call, nothing synchronises,
// and the copy can be captured in a graph.
#include "../gram.h"
#include "check.h"

namespace farms_fast {
namespace {

// As many as a kernel's parameters hold: 32,764 bytes since CUDA 12.1, 4,096 before.
constexpr int kViewsPerLaunch = CUDART_VERSION >= 12010 ? 1000 : 120;
constexpr int kThreads = 256;

struct ViewBatch {
  WindowView views[kViewsPerLaunch];
};

__global__ void store_views_kernel(const __grid_constant__ ViewBatch batch, int count, WindowView* table) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) table[i] = batch.views[i];
}

}  // namespace

void store_window_views_cuda(const WindowView* windows, int64_t count, WindowView* table, void* stream) {
  for (int64_t begin = 0; begin < count; begin += kViewsPerLaunch) {
    const int part = static_cast<int>(count - begin < kViewsPerLaunch ? count - begin : kViewsPerLaunch);
    ViewBatch batch = {};
    for (int i = 0; i < part; ++i) batch.views[i] = windows[begin + i];
    store_views_kernel<<<(part + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        batch, part, table + begin);
    FARMS_LAUNCH_CHECK();
  }
}

}  // namespace farms_fast
