// Every op of torch.ops.farms_fast: its schema, its checks, and the way to its CPU and CUDA implementations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/allocate.h"
#include "csrc/cpu/cpu_eigvalsh.h"
#include "csrc/gram.h"
#include "csrc/op_check.h"
#include "csrc/power_law.h"

#ifdef FARMS_FAST_CUDA
#include "csrc/cuda/context.h"
#include "csrc/cuda/eigvalsh/eigvalsh.h"
#include "csrc/cuda/shared_gram.h"
#endif

namespace farms_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWindowColumns = 6;  // weight, entry, row, column, rows, columns

DType weight_dtype(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::ComplexFloat:
      return DType::c64;
    case ScalarType::ComplexDouble:
      return DType::c128;
    default:
      fail(op, ": argument 'weights': expected float16, bfloat16, float32, float64, complex64 or complex128, got ",
           torch::headeronly::toString(type));
  }
}

DType precision_of(const char* op, ScalarType type) {
  if (type == ScalarType::Double) return DType::f64;
  FARMS_CHECK(type == ScalarType::Float, op, "dtype", "expected float64 or float32, got ",
              torch::headeronly::toString(type));
  return DType::f32;
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ScalarType::Float;
    case DType::c64:
      return ScalarType::ComplexFloat;
    case DType::c128:
      return ScalarType::ComplexDouble;
    default:
      return ScalarType::Double;
  }
}

// The windows of the table, on the weights. Every row is checked here, on the host: a kernel never sees a window that
// leaves its weight.
struct Windows {
  std::vector<Window> windows;
  DType dtype;

  int64_t count() const { return static_cast<int64_t>(windows.size()); }
};

// A weight as its windows see it.
struct Stack {
  const char* data;
  int64_t size[3], stride[3];
};

Windows resolve_windows(const char* op, const std::vector<Tensor>& weights, const Tensor& windows, int64_t order) {
  FARMS_CHECK(!weights.empty(), op, "weights", "expected at least one tensor, got none");
  FARMS_CHECK(order > 0, op, "order", "expected a positive order, got ", order);
  const Tensor& first = weights.front();
  for (size_t w = 0; w < weights.size(); ++w) {
    FARMS_CHECK(weights[w].dim() == 3, op, "weights", "expected stacks of 3 dimensions (entries, rows, columns), got ",
                weights[w].dim(), " dimensions at index ", w);
    FARMS_CHECK(weights[w].scalar_type() == first.scalar_type(), op, "weights", "expected one dtype, got ",
                torch::headeronly::toString(first.scalar_type()), " and ",
                torch::headeronly::toString(weights[w].scalar_type()));
    FARMS_CHECK(weights[w].is_cuda() == first.is_cuda() && weights[w].get_device_index() == first.get_device_index(),
                op, "weights", "expected one device, got another at index ", w);
  }
  FARMS_CHECK(windows.dim() == 2 && windows.size(1) == kWindowColumns && windows.is_cpu() &&
                  windows.scalar_type() == ScalarType::Long && windows.is_contiguous(),
              op, "windows",
              "expected a contiguous int64 CPU tensor of shape (windows, 6), got another kind of tensor");

  Windows resolved{{}, weight_dtype(op, first.scalar_type())};
  // Asked for once a weight, not once a window: each of these is a call into torch.
  std::vector<Stack> stacks;
  for (const Tensor& weight : weights)
    stacks.push_back({static_cast<const char*>(weight.const_data_ptr()),
                      {weight.size(0), weight.size(1), weight.size(2)},
                      {weight.stride(0), weight.stride(1), weight.stride(2)}});
  const int64_t item = static_cast<int64_t>(item_size(resolved.dtype));
  const int64_t count = windows.size(0);
  const int64_t* table = windows.const_data_ptr<int64_t>();
  resolved.windows.reserve(static_cast<size_t>(count));
  for (int64_t b = 0; b < count; ++b) {
    const int64_t* row = table + b * kWindowColumns;
    FARMS_CHECK(row[0] >= 0 && row[0] < static_cast<int64_t>(stacks.size()), op, "windows",
                "expected a weight's index below ", stacks.size(), ", got ", row[0], " in row ", b);
    const Stack& stack = stacks[static_cast<size_t>(row[0])];
    const bool inside = row[1] >= 0 && row[1] < stack.size[0] && row[2] >= 0 && row[3] >= 0 && row[4] > 0 &&
                        row[5] > 0 && row[4] <= stack.size[1] - row[2] && row[5] <= stack.size[2] - row[3];
    FARMS_CHECK(inside, op, "windows", "expected a window inside a stack of shape (", stack.size[0], ", ",
                stack.size[1], ", ", stack.size[2], "), got entry ", row[1], ", row ", row[2], ", column ", row[3],
                ", size ", row[4], " x ", row[5], " in row ", b);
    FARMS_CHECK(std::min(row[4], row[5]) == order, op, "windows", "expected windows of order ", order,
                ", got one of size ", row[4], " x ", row[5], " in row ", b);
    resolved.windows.push_back({row[0], row[1], stack.data + item * row[1] * stack.stride[0], stack.stride[1],
                                stack.stride[2], row[2], row[3], row[4], row[5]});
  }
  return resolved;
}

Tensor window_gram(std::vector<Tensor> weights, Tensor windows, int64_t order, ScalarType dtype) {
  const char* op = "window_gram";
  const DType precision = precision_of(op, dtype);
  const Windows resolved = resolve_windows(op, weights, windows, order);
  Tensor gram = allocate({resolved.count(), order, order}, scalar_type(gram_dtype(resolved.dtype, precision)),
                         weights.front().device());
  if (resolved.count() == 0) return gram;
#ifdef FARMS_FAST_CUDA
  if (gram.is_cuda()) {
    const CudaContext context(gram);
    // Sharing may take as much memory again as the result.
    const int64_t memory = gram.numel() * static_cast<int64_t>(item_size(gram_dtype(resolved.dtype, precision)));
    const GramPlan plan =
        plan_grams_cuda(resolved.windows.data(), resolved.count(), resolved.dtype, /*either_side=*/false, memory);
    const Tensor workspace = context.bytes(plan.workspace_bytes());
    form_grams_cuda(plan, order, resolved.dtype, precision, workspace.mutable_data_ptr(), gram.mutable_data_ptr(),
                    context.stream());
    return gram;
  }
#endif
  window_gram_cpu(resolved.windows.data(), resolved.count(), order, resolved.dtype, precision, gram.mutable_data_ptr());
  return gram;
}

Tensor eigvalsh(Tensor gram, std::string solver, int64_t memory_budget) {
  const char* op = "eigvalsh";
  FARMS_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2), op, "gram",
              "expected a batch of square matrices (batch, order, order), got ", gram.dim(), " dimensions",
              gram.dim() == 3 ? " that are not square" : "");
  FARMS_CHECK(gram.is_contiguous(), op, "gram", "expected a contiguous tensor, got strides");
  FARMS_CHECK(memory_budget >= 0, op, "memory_budget", "expected bytes, or 0 for the default, got ", memory_budget);
  const DType dtype = weight_dtype(op, gram.scalar_type());
  FARMS_CHECK(dtype != DType::f16 && dtype != DType::bf16, op, "gram",
              "expected float32, float64, complex64 or complex128, got ",
              torch::headeronly::toString(gram.scalar_type()));
  Tensor evals = allocate({gram.size(0), gram.size(1)}, scalar_type(real_dtype(dtype)), gram.device());
#ifdef FARMS_FAST_CUDA
  if (gram.is_cuda()) {
    if (evals.numel() > 0) eigvalsh_cuda(gram, dtype, solver, memory_budget, evals);
    return evals;
  }
#endif
  const CpuSolver chosen = cpu_solver(op, solver, dtype, gram.size(1));
  if (evals.numel() > 0)
    eigvalsh_cpu(gram.const_data_ptr(), gram.size(0), gram.size(1), dtype, chosen, memory_budget,
                 evals.mutable_data_ptr());
  return evals;
}

Tensor window_eigvalsh(std::vector<Tensor> weights, Tensor windows, int64_t order, ScalarType dtype, std::string solver,
                       int64_t memory_budget) {
  const char* op = "window_eigvalsh";
  FARMS_CHECK(memory_budget >= 0, op, "memory_budget", "expected bytes, or 0 for the default, got ", memory_budget);
  const DType precision = precision_of(op, dtype);
  const Windows resolved = resolve_windows(op, weights, windows, order);
  const int64_t count = resolved.count();
  Tensor evals = allocate({count, order}, dtype, weights.front().device());
#ifdef FARMS_FAST_CUDA
  if (evals.is_cuda()) {
    if (count > 0)
      window_eigvalsh_cuda(resolved.windows, order, resolved.dtype, precision, solver, memory_budget, evals);
    return evals;
  }
#endif
  const CpuSolver chosen = cpu_solver(op, solver, gram_dtype(resolved.dtype, precision), order);
  if (count > 0)
    window_eigvalsh_cpu(resolved.windows.data(), count, order, resolved.dtype, precision, chosen, memory_budget,
                        evals.mutable_data_ptr());
  return evals;
}

std::vector<std::string> solver_names(std::string device) {
  if (device == "cpu") return cpu_solver_names();
  FARMS_CHECK(device == "cuda", "solver_names", "device", "expected cpu or cuda, got ", device);
#ifdef FARMS_FAST_CUDA
  return cuda_solver_names();
#else
  return {};
#endif
}

XminRule xmin_rule(const std::string& rule) {
  if (rule == "median") return XminRule::median;
  if (rule == "ks") return XminRule::ks;
  FARMS_CHECK(rule == "peak", "fit_power_law", "rule", "expected one of median, ks, peak, got ", rule);
  return XminRule::peak;
}

using FitTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FitTensors fit_power_law(Tensor evals, Tensor offsets, std::string rule, double xmin_pos, int64_t bins,
                         bool log10_lower_bound) {
  const char* op = "fit_power_law";
  const FitSettings settings{xmin_rule(rule), xmin_pos, bins, log10_lower_bound};
  FARMS_CHECK(evals.dim() == 1 && evals.is_contiguous() && evals.scalar_type() == ScalarType::Double, op, "evals",
              "expected a contiguous float64 tensor of one dimension, got ",
              torch::headeronly::toString(evals.scalar_type()), " of ", evals.dim(), " dimensions");
  FARMS_CHECK(
      offsets.dim() == 1 && offsets.numel() > 0 && offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long,
      op, "offsets", "expected a contiguous int64 tensor of shape (spectra + 1,), got ",
      torch::headeronly::toString(offsets.scalar_type()), " of ", offsets.dim(), " dimensions");
  FARMS_CHECK(offsets.is_cuda() == evals.is_cuda() && offsets.get_device_index() == evals.get_device_index(), op,
              "offsets", "expected the device of evals, got another");
  FARMS_CHECK(xmin_pos > 1 && xmin_pos < 1e300, op, "xmin_pos", "expected a finite number above 1, got ", xmin_pos);
  FARMS_CHECK(bins >= 1, op, "bins", "expected at least 1, got ", bins);
  const int64_t spectra = offsets.numel() - 1;
  const auto doubles = [&] { return allocate({spectra}, ScalarType::Double, evals.device()); };
  const auto longs = [&] { return allocate({spectra}, ScalarType::Long, evals.device()); };
  FitTensors fits{doubles(), doubles(), doubles(), longs(), longs(), longs()};
  const FitOutputs outputs{
      std::get<0>(fits).mutable_data_ptr<double>(),  std::get<1>(fits).mutable_data_ptr<double>(),
      std::get<2>(fits).mutable_data_ptr<double>(),  std::get<3>(fits).mutable_data_ptr<int64_t>(),
      std::get<4>(fits).mutable_data_ptr<int64_t>(), std::get<5>(fits).mutable_data_ptr<int64_t>()};
  if (spectra == 0) return fits;
#ifdef FARMS_FAST_CUDA
  if (evals.is_cuda()) {
    const CudaContext context(evals);
    const Tensor workspace =
        context.bytes(static_cast<int64_t>(fit_power_law_cuda_workspace_bytes(evals.numel(), spectra)));
    const int error =
        fit_power_law_cuda(evals.const_data_ptr<double>(), offsets.const_data_ptr<int64_t>(), evals.numel(), spectra,
                           settings, outputs, workspace.mutable_data_ptr(), context.stream());
    if (error != 0) fail(op, ": CUDA error ", error, " at launch");
    return fits;
  }
#endif
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  bool ascending = bounds[0] >= 0 && bounds[spectra] <= evals.numel();
  for (int64_t s = 0; s < spectra; ++s) ascending = ascending && bounds[s] <= bounds[s + 1];
  FARMS_CHECK(ascending, op, "offsets", "expected ascending offsets within ", evals.numel(), " values, got others");
  fit_power_law_cpu(evals.const_data_ptr<double>(), bounds, spectra, settings, outputs);
  return fits;
}

}  // namespace
}  // namespace farms_fast

STABLE_TORCH_LIBRARY(farms_fast, m) {
  m.def("window_gram(Tensor[] weights, Tensor windows, int order, ScalarType dtype) -> Tensor");
  m.def("eigvalsh(Tensor gram, str solver, int memory_budget) -> Tensor");
  m.def(
      "window_eigvalsh(Tensor[] weights, Tensor windows, int order, ScalarType dtype, str solver, int memory_budget) "
      "-> Tensor");
  m.def(
      "fit_power_law(Tensor evals, Tensor offsets, str rule, float xmin_pos, int bins, bool log10_lower_bound) -> "
      "(Tensor alpha, Tensor D, Tensor xmin, Tensor n_tail, Tensor status, Tensor dropped)");
  m.def("solver_names(str device) -> str[]");
}

// One implementation serves both keys: it asks the tensors where they live.
#define FARMS_FAST_IMPLEMENT(m)                                       \
  m.impl("window_gram", TORCH_BOX(&farms_fast::window_gram));         \
  m.impl("eigvalsh", TORCH_BOX(&farms_fast::eigvalsh));               \
  m.impl("window_eigvalsh", TORCH_BOX(&farms_fast::window_eigvalsh)); \
  m.impl("fit_power_law", TORCH_BOX(&farms_fast::fit_power_law))

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CPU, m) { FARMS_FAST_IMPLEMENT(m); }

STABLE_TORCH_LIBRARY_IMPL(farms_fast, CompositeExplicitAutograd, m) {
  m.impl("solver_names", TORCH_BOX(&farms_fast::solver_names));
}

#ifdef FARMS_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(farms_fast, CUDA, m) { FARMS_FAST_IMPLEMENT(m); }
#endif
