// What the kernels of the two-sided update by one panel's reflectors have in common (see band_product.cu and
// band_update.cu): four warps a block, and the panel's columns of V, W and A V in shared memory.
#pragma once

#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/async_copy.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"
#include "csrc/cuda/mma.cuh"

namespace farms_fast {

constexpr int kBandThreads = 128;        // four warps
constexpr int kPanel = kWideBand;        // columns of V, W and A V
constexpr int kPanelPitch = kPanel + 4;  // doubles per row in shared memory: a fragment's loads touch all banks once

struct Warp {
  int warp, group, in_group;  // group, in_group: of a fragment, see mma.cuh
};
__device__ __forceinline__ Warp this_warp() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return {static_cast<int>(threadIdx.x) / 32, lane / 4, lane % 4};
}

// rows x kPanel doubles of V, W or A V into shared memory.
template <int Rows>
__device__ __forceinline__ void copy_rows(double* shared, int pitch, const double* __restrict__ rows) {
#pragma unroll
  for (int i = 0; i < Rows * kPanel / 2 / kBandThreads; ++i) {
    const int index = i * kBandThreads + static_cast<int>(threadIdx.x);
    const int r = index / (kPanel / 2), c = index % (kPanel / 2) * 2;
    copy_async<2>(shared + r * pitch + c, rows + r * kPanel + c);
  }
}

// W of apply_panel, and of the second panel of a pair with A V corrected for the first one.
void form_w(const double* gram, int batch, int order, int begin, const BandWorkspace& workspace, cudaStream_t stream);

}  // namespace farms_fast
