// The one-stage solver for matrices that one block cannot hold: a cluster of blocks each.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace farms_fast {
namespace one_stage {

struct OneStageProblem;

// The largest order, of real matrices; 0 where the device has no clusters or too little shared memory for them.
int max_cluster_order();

void solve_in_clusters(const OneStageProblem& problem, int64_t count, cudaStream_t stream);

}  // namespace one_stage
}  // namespace farms_fast
