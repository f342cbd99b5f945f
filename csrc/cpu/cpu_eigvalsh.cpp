// Batches of matrices or windows through LAPACK or the two-stage solver, a matrix to a thread. A thread copies or forms
// its matrix (order, order) in scratch of its own, because both solvers destroy it.
#include "csrc/cpu/cpu_eigvalsh.h"

#include <cmath>
#include <limits>

#include "csrc/cpu/cpu_gram.h"
#include "csrc/cpu/cpu_shared_gram.h"
#include "csrc/cpu/cpu_two_stage.h"

namespace farms_fast {
namespace {

// From this order on two stages are faster, in float64 and float32. Each of two Zen 4 cores at its own matrices,
// LAPACK's time over theirs: 0.86 at order 128, 0.99 at 256, 1.12 at 384, 1.45 at 512, 1.8 at 1000, 2.8 at 2000.
constexpr int64_t two_stage_order = 256;

// LAPACK's divide-and-conquer drivers with jobz = 'N': tridiagonal reduction, then the root-free QR iteration.
int syevd(int n, float* a, float* w, Scratch<float>& work, int* iwork) {
  const int lwork = 2 * n + 1, liwork = 1;
  int info = 0;
  ssyevd_("N", "L", &n, a, &n, w, work.reserve(lwork), &lwork, iwork, &liwork, &info);
  return info;
}

int syevd(int n, double* a, double* w, Scratch<double>& work, int* iwork) {
  const int lwork = 2 * n + 1, liwork = 1;
  int info = 0;
  dsyevd_("N", "L", &n, a, &n, w, work.reserve(lwork), &lwork, iwork, &liwork, &info);
  return info;
}

int syevd(int n, std::complex<float>* a, float* w, Scratch<std::complex<float>>& work, int* iwork) {
  const int lwork = n + 1, lrwork = n, liwork = 1;
  int info = 0;
  // The real workspace goes behind the complex one.
  std::complex<float>* complex_work = work.reserve(lwork + n);
  cheevd_("N", "L", &n, a, &n, w, complex_work, &lwork, reinterpret_cast<float*>(complex_work + lwork), &lrwork, iwork,
          &liwork, &info);
  return info;
}

int syevd(int n, std::complex<double>* a, double* w, Scratch<std::complex<double>>& work, int* iwork) {
  const int lwork = n + 1, lrwork = n, liwork = 1;
  int info = 0;
  std::complex<double>* complex_work = work.reserve(lwork + n);
  zheevd_("N", "L", &n, a, &n, w, complex_work, &lwork, reinterpret_cast<double*>(complex_work + lwork), &lrwork, iwork,
          &liwork, &info);
  return info;
}

template <typename T>
bool triangle_is_finite(const T* a, int64_t order) {
  // x - x is 0 for a finite value and NaN for any other, so that one sum tells.
  T sum(0);
  for (int64_t j = 0; j < order; ++j)
    for (int64_t i = j; i < order; ++i) sum += a[j * order + i] - a[j * order + i];
  return sum == T(0);
}

template <typename T>
struct SolverScratch {
  Scratch<T> work;
  Scratch<double> tridiagonal;
};

// Bytes that a thread takes besides the Gram matrix. item: of an element of that.
int64_t scratch_bytes(int64_t order, int64_t item, CpuSolver solver) {
  if (solver == CpuSolver::lapack) return 0;
  return two_stage_workspace(order) * item + 2 * order * static_cast<int64_t>(sizeof(double));
}

// Likewise where the matrix is that of a window, which may have to be packed first.
int64_t window_scratch_bytes(int64_t order, int64_t inner, int64_t item, CpuSolver solver) {
  const int64_t pieces = inner > summed_depth(order) ? 2 * tile_rows * tile_columns : 0;
  return (order * inner + pieces) * item + scratch_bytes(order, item, solver);
}

template <typename T, typename Real>
bool solve(T* a, int64_t order, CpuSolver solver, SolverScratch<T>& scratch, Real* evals) {
  if constexpr (std::is_floating_point_v<T>) {
    if (solver == CpuSolver::two_stage)
      return two_stage_eigenvalues(a, order, scratch.work.reserve(two_stage_workspace(order)),
                                   scratch.tridiagonal.reserve(2 * order), evals);
  }
  // LAPACK scales matrices near the ends of the exponent range by itself.
  int iwork = 0;
  return syevd(static_cast<int>(order), a, evals, scratch.work, &iwork) == 0;
}

// Destroys `a`.
template <typename T, typename Real = typename RealOf<T>::type>
void eigenvalues_in_place(T* a, int64_t order, CpuSolver solver, SolverScratch<T>& scratch, Real* evals) {
  if (!triangle_is_finite(a, order) || !solve(a, order, solver, scratch, evals))
    std::fill(evals, evals + order, std::numeric_limits<Real>::quiet_NaN());
}

// Operations for the eigenvalues of so many matrices, roughly.
double solver_work(int64_t count, int64_t order) {
  const double n = static_cast<double>(order);
  return static_cast<double>(count) * (4.0 / 3.0) * n * n * n;
}

// Runs body(begin, end) over the batch, on as many threads as the budget holds the scratch of. A matrix alone leaves
// the threads to its own tiles.
template <typename Body>
void over_batch(int64_t count, double work, int64_t bytes_per_thread, int64_t memory_budget, const Body& body) {
  int64_t threads = work < kLeastParallelWork ? 1 : thread_count();
  if (memory_budget > 0) {
    FARMS_CHECK(bytes_per_thread <= memory_budget, "eigvalsh", "memory_budget", "expected at least the ",
                bytes_per_thread, " bytes of one matrix, got ", memory_budget);
    threads = std::min(threads, memory_budget / bytes_per_thread);
  }
  on_threads(threads, count, body);
}

template <typename T, typename Real = typename RealOf<T>::type>
void solve_batch(const T* gram, int64_t count, int64_t order, CpuSolver solver, int64_t memory_budget, Real* evals) {
  constexpr int64_t item = sizeof(T);
  const int64_t matrix = order * order, bytes = matrix * item + scratch_bytes(order, item, solver);
  over_batch(count, solver_work(count, order), bytes, memory_budget, [&](int64_t begin, int64_t end) {
    Scratch<T> copy;
    SolverScratch<T> scratch;
    for (int64_t b = begin; b < end; ++b) {
      T* a = copy.reserve(matrix);
      std::copy(gram + b * matrix, gram + (b + 1) * matrix, a);
      eigenvalues_in_place(a, order, solver, scratch, evals + b * order);
    }
  });
}

template <typename T, typename Real = typename RealOf<T>::type>
void solve_windows(const Window* windows, int64_t count, int64_t order, DType in, CpuSolver solver,
                   int64_t memory_budget, Real* evals) {
  int64_t inner = 0;
  for (int64_t b = 0; b < count; ++b) inner = std::max({inner, windows[b].rows, windows[b].columns});
  constexpr int64_t item = sizeof(T);
  const int64_t bytes = order * order * item + window_scratch_bytes(order, inner, item, solver);
  // What is shared, and with it the bits of the result, must not depend on the number of threads.
  const int64_t memory = memory_budget > 0 ? std::min(memory_budget / 2, memory_budget - bytes) : int64_t{1} << 30;
  over_gram_batches<T>(windows, count, order, in, /*either_side=*/true, memory, [&](const GramBatch<T>& batch) {
    const double work = batch.work() + solver_work(batch.count(), order);
    const int64_t left = memory_budget > 0 ? memory_budget - batch.bytes() : 0;
    over_batch(batch.count(), work, bytes, left, [&](int64_t begin, int64_t end) {
      Scratch<T> packed, gram;
      SolverScratch<T> scratch;
      for (int64_t b = begin; b < end; ++b) {
        T* a = gram.reserve(order * order);
        batch.triangle(b, packed, a);
        Real* out = evals + batch.window(b) * order;
        eigenvalues_in_place(a, order, solver, scratch, out);
        for (int64_t i = 0; i < order; ++i)
          if (out[i] < 0) out[i] = 0;
      }
    });
  });
}

}  // namespace

std::vector<std::string> cpu_solver_names() { return {"lapack", "two_stage"}; }

CpuSolver cpu_solver(const char* op, const std::string& name, DType dtype, int64_t order) {
  const bool real = dtype == DType::f32 || dtype == DType::f64;
  if (name == "auto") return real && order >= two_stage_order ? CpuSolver::two_stage : CpuSolver::lapack;
  if (name == "lapack") return CpuSolver::lapack;
  FARMS_CHECK(name == "two_stage", op, "solver", "expected one of auto, lapack, two_stage on the CPU, got ", name);
  FARMS_CHECK(real, op, "solver", "expected one that takes order ", order,
              " of complex matrices on the CPU, got two_stage, which takes real ones only");
  return CpuSolver::two_stage;
}

SolverFacts cpu_solver_facts(CpuSolver solver, int64_t count, int64_t order, int64_t inner, DType gram) {
  const int64_t item = static_cast<int64_t>(item_size(gram));
  return {cpu_solver_names()[static_cast<size_t>(solver)], count, order * order * item,
          count * window_scratch_bytes(order, inner, item, solver)};
}

void eigvalsh_cpu(const void* gram, int64_t count, int64_t order, DType dtype, CpuSolver solver, int64_t memory_budget,
                  void* evals) {
  require_lapack("eigvalsh");
  switch (dtype) {
    case DType::f32:
      return solve_batch(static_cast<const float*>(gram), count, order, solver, memory_budget,
                         static_cast<float*>(evals));
    case DType::f64:
      return solve_batch(static_cast<const double*>(gram), count, order, solver, memory_budget,
                         static_cast<double*>(evals));
    case DType::c64:
      return solve_batch(static_cast<const std::complex<float>*>(gram), count, order, solver, memory_budget,
                         static_cast<float*>(evals));
    default:
      return solve_batch(static_cast<const std::complex<double>*>(gram), count, order, solver, memory_budget,
                         static_cast<double*>(evals));
  }
}

void window_eigvalsh_cpu(const Window* windows, int64_t count, int64_t order, DType in, DType precision,
                         CpuSolver solver, int64_t memory_budget, void* evals) {
  require_lapack("window_eigvalsh");
  switch (gram_dtype(in, precision)) {
    case DType::f32:
      return solve_windows<float>(windows, count, order, in, solver, memory_budget, static_cast<float*>(evals));
    case DType::f64:
      return solve_windows<double>(windows, count, order, in, solver, memory_budget, static_cast<double*>(evals));
    case DType::c64:
      return solve_windows<std::complex<float>>(windows, count, order, in, solver, memory_budget,
                                                static_cast<float*>(evals));
    default:
      return solve_windows<std::complex<double>>(windows, count, order, in, solver, memory_budget,
                                                 static_cast<double*>(evals));
  }
}

}  // namespace farms_fast
