// Batches of any size through a CUDA solver, in chunks that its limits and the memory budget allow.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/gram.h"

namespace farms_fast {

// Names of the solvers of this build.
std::vector<std::string> cuda_solver_names();

// gram: (count, order, order), contiguous, read only. evals: (count, order), written.
// memory_budget: bytes of workspace, Gram matrices included; 0 for a quarter of the device's memory.
void eigvalsh_cuda(const torch::stable::Tensor& gram, DType dtype, const std::string& solver, int64_t memory_budget,
                   torch::stable::Tensor& evals);

// Gram and eigenvalues, a chunk of windows at a time; negative rounding noise becomes 0. evals: (count, order),
// written.
void window_eigvalsh_cuda(const std::vector<Window>& windows, int64_t order, DType in, DType precision,
                          const std::string& solver, int64_t memory_budget, torch::stable::Tensor& evals);

}  // namespace farms_fast
