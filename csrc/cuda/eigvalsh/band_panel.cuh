// What the kernels of the two-sided update by one panel's reflectors have in common (see band_product.cu and
// band_update.cu): four warps a block, and the panel's columns of V, W and A V in shared memory.
#pragma once

#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/async_copy.cuh"
#include "csrc/cuda/eigvalsh/two_stage.h"
#include "csrc/cuda/hopper.h"
#include "csrc/cuda/mma.cuh"

namespace farms_fast {

constexpr int kBandThreads = 128;           // four warps
constexpr int kPanelPitch = kWideBand + 4;  // doubles per row in shared memory: a fragment's loads touch all banks once

// Orders by how a matrix's rows are aligned: doubles of one access to them.
struct EvenOrder {
  static constexpr int doubles = 2;
};
struct OddOrder {
  static constexpr int doubles = 1;
};

// The panels of a column of tiles. Shares: of the small products over the rows, V^T A V, and for the second panel W^T V
// and V^T V with W and V of the first one on the left.
struct FirstOfPair {
  static constexpr bool second = false;
  static constexpr int panels = 1, shares = 1;
};
struct SecondOfPair {
  static constexpr bool second = true;
  static constexpr int panels = 2, shares = kMostShares;
};

struct PanelWarp {
  int warp, group, in_group;  // group, in_group: of a fragment, see mma.cuh
};
__device__ __forceinline__ PanelWarp this_warp() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return {static_cast<int>(threadIdx.x) / 32, lane / 4, lane % 4};
}

// rows x kWideBand doubles of V, W or A V into shared memory.
template <int Rows>
__device__ __forceinline__ void copy_rows(double* shared, int pitch, const double* __restrict__ rows) {
#pragma unroll
  for (int i = 0; i < Rows * kWideBand / 2 / kBandThreads; ++i) {
    const int index = i * kBandThreads + static_cast<int>(threadIdx.x);
    const int r = index / (kWideBand / 2), c = index % (kWideBand / 2) * 2;
    copy_async<2>(shared + r * pitch + c, rows + r * kWideBand + c);
  }
}

// Calls run with an EvenOrder or OddOrder and a FirstOfPair or SecondOfPair, for their types.
template <typename Run>
void dispatch_panel(int order, int begin, const Run& run) {
  const bool second = is_second_panel(begin - kWideBand);
  if (order % 2 == 0)
    second ? run(EvenOrder{}, SecondOfPair{}) : run(EvenOrder{}, FirstOfPair{});
  else
    second ? run(OddOrder{}, SecondOfPair{}) : run(OddOrder{}, FirstOfPair{});
}

// W of apply_panel, and of the second panel of a pair with A V corrected for the first one.
void form_w(const double* gram, int batch, int order, int begin, const BandWorkspace& workspace,
            const CudaDevice& device, cudaStream_t stream);

}  // namespace farms_fast
