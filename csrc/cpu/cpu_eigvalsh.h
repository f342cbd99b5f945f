// Eigenvalues of batches of real symmetric or complex Hermitian matrices, ascending. A matrix that holds a value that
// is not finite gets NaN for every eigenvalue: it never reaches a solver, and its neighbours do not notice.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/dtype.h"
#include "csrc/gram.h"
#include "csrc/host/solver_facts.h"

namespace farms_fast {

enum class CpuSolver { lapack, two_stage };

// In the order of the enum.
std::vector<std::string> cpu_solver_names();

// The solver of that name, or the fastest where the name is auto. `op` is for the error of one that does not exist or
// does not take such matrices.
CpuSolver cpu_solver(const char* op, const std::string& name, DType dtype, int64_t order);

// inner: the longer side of the windows. gram: the type of their Gram matrices. Each thread solves one matrix at a
// time.
SolverFacts cpu_solver_facts(CpuSolver solver, int64_t count, int64_t order, int64_t inner, DType gram);

// gram: (count, order, order), symmetric or Hermitian, read only.
// evals: (count, order), of type real_dtype(dtype).
// memory_budget: bytes of workspace over all threads, 0 for no bound.
void eigvalsh_cpu(const void* gram, int64_t count, int64_t order, DType dtype, CpuSolver solver, int64_t memory_budget,
                  void* evals);

// Gram and eigenvalues; negative rounding noise becomes 0. memory_budget: 0 for 1 GiB of what windows share and no
// bound on the rest. evals: (count, order), of type `precision`.
void window_eigvalsh_cpu(const Window* windows, int64_t count, int64_t order, DType in, DType precision,
                         CpuSolver solver, int64_t memory_budget, void* evals);

}  // namespace farms_fast
