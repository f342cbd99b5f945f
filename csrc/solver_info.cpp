// The ops about solvers: solver_names, compute_capability, cuda_versions, and solver_facts, by which a run is planned.
// None takes a tensor.
#include "csrc/solver_info.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "csrc/cpu/cpu_eigvalsh.h"
#include "csrc/op_arguments.h"
#include "csrc/op_check.h"

namespace farms_fast {

// Set before anything runs, whatever the order in which the files' statics are initialised.
const CudaMachine* cuda_machine = nullptr;

namespace {

void check_device(const char* op, const std::string& device) {
  FARMS_CHECK(device == "cpu" || device == "cuda", op, "device", "expected cpu or cuda, got ", device);
}

std::vector<std::string> solver_names(std::string device) {
  check_device("solver_names", device);
  if (device == "cpu") return cpu_solver_names();
  std::vector<std::string> names;
  if (cuda_machine != nullptr)
    for (const CudaSolverTraits* solver : kCudaSolvers) names.emplace_back(solver->name);
  return names;
}

const CudaMachine& machine_here(const char* op) {
  FARMS_CHECK(cuda_machine != nullptr, op, "device", "expected a build with CUDA, got one without");
  return *cuda_machine;
}

// Of the current device, as this build's code knows it.
int64_t compute_capability() { return machine_here("compute_capability").current_device().architecture; }

// Of the driver, the CUDA runtime and cuSOLVER.
std::tuple<int64_t, int64_t, int64_t> cuda_versions() {
  const CudaVersions found = machine_here("cuda_versions").versions();
  return {found.driver, found.runtime, found.cusolver};
}

// On CUDA without a compute capability: of the current device, which tells its own facts and library's.
SolverFacts facts_on_cuda(const char* op, int64_t compute_capability, int64_t count, int64_t order, DType gram,
                          const std::string& name) {
  const bool here = compute_capability == 0;
  FARMS_CHECK(!here || cuda_machine != nullptr, op, "compute_capability",
              "expected that of a GPU, such as 90, in a build without CUDA, got 0");
  FARMS_CHECK(here || (compute_capability >= 50 && compute_capability < 1000), op, "compute_capability",
              "expected 10 * major + minor of a GPU, such as 90, got ", compute_capability);
  const CudaDevice device = here ? cuda_machine->current_device() : cuda_device(static_cast<int>(compute_capability));
  const CudaSolverTraits& solver = cuda_solver(op, name, device, count, order, gram);
  SolverFacts facts = cuda_solver_facts(solver, count, order, gram);
  if (here) facts.workspace_bytes = cuda_machine->workspace_bytes(solver, facts.max_batch, order, gram);
  return facts;
}

std::tuple<std::string, int64_t, int64_t, int64_t> solver_facts(std::string device, int64_t compute_capability,
                                                                int64_t count, int64_t order, int64_t inner,
                                                                ScalarType dtype, std::string solver) {
  const char* op = "solver_facts";
  check_device(op, device);
  FARMS_CHECK(count > 0, op, "count", "expected a positive number of windows, got ", count);
  FARMS_CHECK(order > 0, op, "order", "expected a positive order, got ", order);
  FARMS_CHECK(inner >= order, op, "inner", "expected the longer side of windows of order ", order, ", got ", inner);
  const DType gram = gram_matrix_dtype(op, "dtype", dtype);
  const SolverFacts facts = device == "cpu"
                                ? cpu_solver_facts(cpu_solver(op, solver, gram, order), count, order, inner, gram)
                                : facts_on_cuda(op, compute_capability, count, order, gram, solver);
  return {facts.solver, facts.max_batch, facts.matrix_bytes, facts.workspace_bytes};
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY_FRAGMENT(farms_fast, m) {
  m.def("solver_names(str device) -> str[]");
  m.def("compute_capability() -> int");
  m.def("cuda_versions() -> (int driver, int runtime, int cusolver)");
  m.def(
      "solver_facts(str device, int compute_capability, int count, int order, int inner, ScalarType dtype, str solver) "
      "-> (str solver, int max_batch, int matrix_bytes, int workspace_bytes)");
}

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CompositeExplicitAutograd, m) {
  m.impl("solver_names", TORCH_BOX(&farms_fast::solver_names));
  m.impl("compute_capability", TORCH_BOX(&farms_fast::compute_capability));
  m.impl("cuda_versions", TORCH_BOX(&farms_fast::cuda_versions));
  m.impl("solver_facts", TORCH_BOX(&farms_fast::solver_facts));
}
