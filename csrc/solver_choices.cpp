// The ops about the choice of CUDA solvers: set_solver_choices, which takes what was measured on a GPU of this machine,
// and shipped_choices, which says whose measurements decide without it.
#include "csrc/solver_choices.h"

#include <torch/csrc/stable/library.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "csrc/host/cuda_solvers.h"
#include "csrc/op_check.h"

namespace farms_fast {
namespace {

struct ChoicesOfDevices {
  std::mutex mutex;
  std::map<int64_t, std::vector<ChoiceRow>> rows;
};

ChoicesOfDevices& choices() {
  static ChoicesOfDevices known;
  return known;
}

const char* known_solver(const std::string& name) {
  for (const CudaSolverTraits* solver : kCudaSolvers)
    if (name == solver->name) return solver->name;
  fail("set_solver_choices: argument 'solvers': expected names of CUDA solvers, got ", name);
}

// Row i: is_complex[i] != 0, up_to_order[i], up_to_batch[i], solvers[i]. They take the place of the device's former
// ones.
void set_solver_choices(int64_t device, std::vector<int64_t> is_complex, std::vector<int64_t> up_to_order,
                        std::vector<int64_t> up_to_batch, std::vector<std::string> solvers) {
  const char* op = "set_solver_choices";
  FARMS_CHECK(device >= -1, op, "device", "expected the index of a GPU, or -1, got ", device);
  const size_t count = solvers.size();
  FARMS_CHECK(is_complex.size() == count && up_to_order.size() == count && up_to_batch.size() == count, op, "solvers",
              "expected lists of one length, got ", count, " solvers");
  std::vector<ChoiceRow> rows;
  for (size_t i = 0; i < count; ++i) {
    FARMS_CHECK(up_to_order[i] > 0, op, "up_to_order", "expected positive orders, got ", up_to_order[i]);
    FARMS_CHECK(up_to_batch[i] > 0, op, "up_to_batch", "expected positive batches, got ", up_to_batch[i]);
    const Field field = is_complex[i] != 0 ? Field::complex : Field::real;
    rows.push_back({field, up_to_order[i], up_to_batch[i], known_solver(solvers[i])});
  }
  const std::lock_guard<std::mutex> lock(choices().mutex);
  choices().rows[device] = std::move(rows);
}

// The architecture whose shipped measurements decide on one of this compute capability, 0 where a model does.
int64_t shipped_choices(int64_t compute_capability) {
  const int measured = measured_architecture(static_cast<int>(compute_capability));
  for (const MeasuredChoice& row : kMeasuredChoices)
    if (row.architecture == measured) return measured;
  return 0;
}

}  // namespace

const char* choice_of_device(int device, int64_t count, int64_t order, DType gram) {
  const std::lock_guard<std::mutex> lock(choices().mutex);
  const auto found = choices().rows.find(device);
  if (found == choices().rows.end()) return nullptr;
  for (const ChoiceRow& row : found->second)
    if (row.holds(count, order, gram)) return row.solver;
  return nullptr;
}

}  // namespace farms_fast

STABLE_TORCH_LIBRARY_FRAGMENT(farms_fast, m) {
  m.def("set_solver_choices(int device, int[] is_complex, int[] up_to_order, int[] up_to_batch, str[] solvers) -> ()");
  m.def("shipped_choices(int compute_capability) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CompositeExplicitAutograd, m) {
  m.impl("set_solver_choices", TORCH_BOX(&farms_fast::set_solver_choices));
  m.impl("shipped_choices", TORCH_BOX(&farms_fast::shipped_choices));
}
