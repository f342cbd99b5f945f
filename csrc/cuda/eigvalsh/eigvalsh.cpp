// The ops eigvalsh and window_eigvalsh on CUDA: batches of any size through a solver, in chunks that its limits and the
// memory budget allow.
#include "csrc/eigvalsh.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "csrc/cuda/check.h"
#include "csrc/cuda/context.h"
#include "csrc/cuda/current_device.h"
#include "csrc/cuda/eigvalsh/one_stage.h"
#include "csrc/cuda/eigvalsh/scale.h"
#include "csrc/cuda/eigvalsh/solver.h"
#include "csrc/cuda/shared_gram.h"
#include "csrc/solver_info.h"

namespace farms_fast {
namespace {

const CudaSolver& one_stage() {
  static const DirectSolver direct{one_stage_windows, one_stage_gram};
  static const CudaSolver solver{kOneStage, &direct, nullptr};
  return solver;
}

const CudaSolver& solver_of(const CudaSolverTraits& traits) {
  static const std::vector<const CudaSolver*> solvers{&cusolver(), &one_stage(), &two_stage()};
  for (const CudaSolver* solver : solvers)
    if (&solver->traits == &traits) return *solver;
  fail("cuda: no solver behind the name ", traits.name);
}

// What the ops about solvers learn from this machine.
int64_t workspace_bytes(const CudaSolverTraits& traits, int64_t batch, int64_t order, DType gram) {
  const InPlaceSolver* in_place = solver_of(traits).in_place;
  return in_place == nullptr ? 0 : in_place->workspace_bytes(batch, order, gram);
}

CudaVersions versions() {
  CudaVersions found{};
  FARMS_CUDA_CHECK(cudaDriverGetVersion(&found.driver));
  FARMS_CUDA_CHECK(cudaRuntimeGetVersion(&found.runtime));
  found.cusolver = cusolver_version();
  return found;
}

const CudaMachine kMachine{current_device, workspace_bytes, versions};
[[maybe_unused]] const CudaMachine* const told = cuda_machine = &kMachine;

const CudaSolver& find_solver(const char* op, const std::string& name, int64_t count, int64_t order, DType gram) {
  return solver_of(cuda_solver(op, name, current_device(), count, order, gram));
}

// A quarter of the device's memory: fixed for a device, so that the same input always falls into the same chunks.
int64_t default_budget() {
  static thread_local int64_t total = [] {
    size_t available = 0, all = 0;
    FARMS_CUDA_CHECK(cudaMemGetInfo(&available, &all));
    return static_cast<int64_t>(all);
  }();
  return total / 4;
}

struct Chunks {
  int64_t size;
  int64_t workspace;
};

// The most matrices at once whose copies and workspace fit into the budget, spread evenly over the calls.
Chunks plan_chunks(const char* op, const CudaSolver& solver, int64_t count, int64_t order, DType dtype,
                   int64_t memory_budget) {
  const int64_t budget = memory_budget > 0 ? memory_budget : default_budget();
  const int64_t matrix = order * order * static_cast<int64_t>(item_size(dtype));
  const auto workspace = [&](int64_t batch) { return workspace_bytes(solver.traits, batch, order, dtype); };
  const auto needed = [&](int64_t batch) { return batch * matrix + workspace(batch); };
  int64_t most = std::min(count, solver.traits.max_batch(order));
  most = std::max<int64_t>(1, std::min(most, budget / matrix));
  while (most > 1 && needed(most) > budget) most = std::max<int64_t>(1, most * 7 / 8);
  FARMS_CHECK(needed(most) <= budget, op, "memory_budget", "expected at least the ", needed(most),
              " bytes of one matrix of order ", order, " and its workspace, got ", budget);
  const int64_t calls = (count + most - 1) / most;
  const int64_t size = (count + calls - 1) / calls;
  // Before the solver it holds the windows' table.
  const int64_t table = size * static_cast<int64_t>(sizeof(WindowView));
  return {size, std::max(table, workspace(size))};
}

// fill(begin, batch, gram, workspace, bytes): writes the chunk's Gram matrices; until then the solver's workspace is
// free.
template <typename Fill>
void solve_chunks(const char* op, const CudaSolver& solver, int64_t count, int64_t order, DType dtype,
                  int64_t memory_budget, bool clip, const CudaContext& context, const Tensor& evals, const Fill& fill) {
  const Chunks chunks = plan_chunks(op, solver, count, order, dtype, memory_budget);
  const int64_t matrix = order * order * static_cast<int64_t>(item_size(dtype));
  const DType real = real_dtype(dtype);
  const auto gram = context.bytes(chunks.size * matrix);
  const auto workspace = context.bytes(chunks.workspace);
  const auto state = context.bytes(chunks.size * static_cast<int64_t>(sizeof(unsigned long long) + 2 * sizeof(int)));
  auto* largest = static_cast<unsigned long long*>(state.mutable_data_ptr());
  int* exponents = reinterpret_cast<int*>(largest + chunks.size);
  int* failed = exponents + chunks.size;
  for (int64_t begin = 0; begin < count; begin += chunks.size) {
    const int64_t batch = std::min(chunks.size, count - begin);
    char* out = static_cast<char*>(evals.mutable_data_ptr()) + begin * order * static_cast<int64_t>(item_size(real));
    fill(begin, batch, gram.mutable_data_ptr(), workspace.mutable_data_ptr(), chunks.workspace);
    scale_gram(gram.mutable_data_ptr(), batch, order, dtype, largest, exponents, context.stream());
    solver.in_place->solve(gram.mutable_data_ptr(), batch, order, dtype, workspace.mutable_data_ptr(), out, failed,
                           context.stream());
    unscale_eigenvalues(out, batch, order, real, exponents, failed, clip, context.stream());
  }
}

void form_chunk(const std::vector<Window>& windows, int64_t begin, int64_t batch, int64_t order, DType in,
                DType precision, void* gram, void* workspace, int64_t bytes, const CudaContext& context) {
  const GramPlan plan = plan_grams_cuda(windows.data() + begin, batch, in, /*either_side=*/true, bytes);
  form_grams_cuda(plan, order, in, precision, workspace, gram, context.stream());
}

int64_t longest_inner(const std::vector<Window>& windows) {
  int64_t longest = 0;
  for (const Window& window : windows) longest = std::max({longest, window.rows, window.columns});
  return longest;
}

void solve_windows(const CudaSolver& solver, const std::vector<Window>& windows, int64_t order, DType in,
                   DType precision, const CudaContext& context, const Tensor& evals) {
  std::vector<WindowView> views;
  for (const Window& window : windows) views.push_back(view_of(window, in));
  const int64_t count = static_cast<int64_t>(windows.size()), bytes = count * static_cast<int64_t>(sizeof(WindowView));
  const auto table = context.bytes(bytes);
  void* stored = table.mutable_data_ptr();
  store_table_cuda(reinterpret_cast<const int64_t*>(views.data()), bytes / static_cast<int64_t>(sizeof(int64_t)),
                   stored, context.stream());
  solver.direct->solve_windows(static_cast<const WindowView*>(stored), count, order, in, precision,
                               evals.mutable_data_ptr(), context.stream());
}

// By their Gram matrices, in float64 whatever the precision, as in the solver's own.
void solve_grams(const char* op, const CudaSolver& solver, const std::vector<Window>& windows, int64_t order, DType in,
                 DType precision, int64_t memory_budget, const CudaContext& context, const Tensor& evals) {
  const int64_t count = static_cast<int64_t>(windows.size());
  const DType gram = gram_dtype(in, DType::f64);
  const Chunks chunks = plan_chunks(op, solver, count, order, gram, memory_budget);
  const auto matrices = context.bytes(chunks.size * order * order * static_cast<int64_t>(item_size(gram)));
  const auto workspace = context.bytes(chunks.workspace);
  for (int64_t begin = 0; begin < count; begin += chunks.size) {
    const int64_t batch = std::min(chunks.size, count - begin);
    form_chunk(windows, begin, batch, order, in, DType::f64, matrices.mutable_data_ptr(), workspace.mutable_data_ptr(),
               chunks.workspace, context);
    char* out =
        static_cast<char*>(evals.mutable_data_ptr()) + begin * order * static_cast<int64_t>(item_size(precision));
    solver.direct->solve_gram(matrices.mutable_data_ptr(), batch, order, gram, precision, /*clip=*/true, out,
                              context.stream());
  }
}

Tensor eigvalsh(Tensor gram, std::string name, int64_t memory_budget) {
  const char* op = "eigvalsh";
  const auto [dtype, evals] = check_eigvalsh(gram, memory_budget);
  if (evals.numel() == 0) return evals;
  const CudaContext context(gram);
  const int64_t count = gram.size(0), order = gram.size(1);
  const CudaSolver& solver = find_solver(op, name, count, order, dtype);
  if (solver.direct != nullptr) {
    solver.direct->solve_gram(gram.const_data_ptr(), count, order, dtype, real_dtype(dtype), /*clip=*/false,
                              evals.mutable_data_ptr(), context.stream());
    return evals;
  }
  const int64_t matrix = order * order * static_cast<int64_t>(item_size(dtype));
  const char* data = static_cast<const char*>(gram.const_data_ptr());
  solve_chunks(op, solver, count, order, dtype, memory_budget, /*clip=*/false, context, evals,
               [&](int64_t begin, int64_t batch, void* chunk, void*, int64_t) {
                 FARMS_CUDA_CHECK(cudaMemcpyAsync(chunk, data + begin * matrix, batch * matrix,
                                                  cudaMemcpyDeviceToDevice, context.stream()));
               });
  return evals;
}

Tensor window_eigvalsh(std::vector<Tensor> weights, Tensor table, int64_t order, ScalarType dtype, std::string name,
                       int64_t memory_budget) {
  const char* op = "window_eigvalsh";
  const WindowEigvalshCall call = check_window_eigvalsh(weights, table, order, dtype, memory_budget);
  const std::vector<Window>& windows = call.table.windows;
  const Tensor& evals = call.evals;
  const DType in = call.table.dtype, precision = call.precision;
  if (windows.empty()) return evals;
  const CudaContext context(evals);
  const int64_t count = call.table.count();
  const CudaSolver& solver = find_solver(op, name, count, order, call.gram());
  if (solver.direct == nullptr)
    solve_chunks(op, solver, count, order, call.gram(), memory_budget, /*clip=*/true, context, evals,
                 [&](int64_t begin, int64_t batch, void* chunk, void* workspace, int64_t bytes) {
                   form_chunk(windows, begin, batch, order, in, precision, chunk, workspace, bytes, context);
                 });
  else if (order <= solver.traits.max_window_order(call.gram()) &&
           (precision == DType::f32 || longest_inner(windows) <= summed_depth(order)))
    solve_windows(solver, windows, order, in, precision, context, evals);
  else
    solve_grams(op, solver, windows, order, in, precision, memory_budget, context, evals);
  return evals;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CUDA, m) {
  m.impl("eigvalsh", TORCH_BOX(&farms_fast::eigvalsh));
  m.impl("window_eigvalsh", TORCH_BOX(&farms_fast::window_eigvalsh));
}
