#include "../eigvalsh.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "gram.h"

namespace farms_fast {
namespace {

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

// Destroys `a`. LAPACK scales matrices near the ends of the exponent range by itself.
template <typename T, typename Real = typename RealOf<T>::type>
void eigenvalues_in_place(T* a, int64_t order, Scratch<T>& work, Real* evals) {
  int iwork = 0;
  if (!triangle_is_finite(a, order) || syevd(static_cast<int>(order), a, evals, work, &iwork) != 0)
    std::fill(evals, evals + order, std::numeric_limits<Real>::quiet_NaN());
}

// Runs body(begin, end) over the batch, on as many threads as the budget holds the scratch of.
template <typename Body>
void over_batch(int64_t count, int64_t bytes_per_thread, int64_t memory_budget, const Body& body) {
  int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  if (memory_budget > 0) {
    FARMS_CHECK(bytes_per_thread <= memory_budget, "eigvalsh", "memory_budget", "expected at least the ",
                bytes_per_thread, " bytes of one matrix, got ", memory_budget);
    threads = std::min(threads, memory_budget / bytes_per_thread);
  }
  const int64_t grain = std::max<int64_t>(1, (count + threads - 1) / threads);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    // A batch of one leaves the cores to MKL; otherwise the batch is what runs in parallel.
    std::unique_ptr<SingleThreadedBlas> single;
    if (end - begin < count) single = std::make_unique<SingleThreadedBlas>();
    body(begin, end);
  });
}

template <typename T, typename Real = typename RealOf<T>::type>
void solve_batch(const T* gram, int64_t count, int64_t order, int64_t memory_budget, Real* evals) {
  const int64_t matrix = order * order;
  over_batch(count, matrix * static_cast<int64_t>(sizeof(T)), memory_budget, [&](int64_t begin, int64_t end) {
    Scratch<T> copy, work;
    for (int64_t b = begin; b < end; ++b) {
      T* a = copy.reserve(matrix);
      std::copy(gram + b * matrix, gram + (b + 1) * matrix, a);
      eigenvalues_in_place(a, order, work, evals + b * order);
    }
  });
}

template <typename T, typename Real = typename RealOf<T>::type>
void solve_windows(const WindowView* windows, int64_t count, int64_t order, DType in, int64_t memory_budget,
                   Real* evals) {
  int64_t inner = 0;
  for (int64_t b = 0; b < count; ++b) inner = std::max(inner, windows[b].inner);
  const int64_t bytes = order * (order + inner) * static_cast<int64_t>(sizeof(T));
  over_batch(count, bytes, memory_budget, [&](int64_t begin, int64_t end) {
    Scratch<T> packed, gram, work;
    for (int64_t b = begin; b < end; ++b) {
      T* a = gram.reserve(order * order);
      gram_triangle(windows[b], order, in, packed, a);
      Real* out = evals + b * order;
      eigenvalues_in_place(a, order, work, out);
      for (int64_t i = 0; i < order; ++i)
        if (out[i] < 0) out[i] = 0;
    }
  });
}

}  // namespace

void eigvalsh_cpu(const void* gram, int64_t count, int64_t order, DType dtype, int64_t memory_budget, void* evals) {
  require_lapack("eigvalsh");
  switch (dtype) {
    case DType::f32:
      return solve_batch(static_cast<const float*>(gram), count, order, memory_budget, static_cast<float*>(evals));
    case DType::f64:
      return solve_batch(static_cast<const double*>(gram), count, order, memory_budget, static_cast<double*>(evals));
    case DType::c64:
      return solve_batch(static_cast<const std::complex<float>*>(gram), count, order, memory_budget,
                         static_cast<float*>(evals));
    default:
      return solve_batch(static_cast<const std::complex<double>*>(gram), count, order, memory_budget,
                         static_cast<double*>(evals));
  }
}

void window_eigvalsh_cpu(const WindowView* windows, int64_t count, int64_t order, DType in, DType precision,
                         int64_t memory_budget, void* evals) {
  require_lapack("window_eigvalsh");
  switch (gram_dtype(in, precision)) {
    case DType::f32:
      return solve_windows<float>(windows, count, order, in, memory_budget, static_cast<float*>(evals));
    case DType::f64:
      return solve_windows<double>(windows, count, order, in, memory_budget, static_cast<double*>(evals));
    case DType::c64:
      return solve_windows<std::complex<float>>(windows, count, order, in, memory_budget, static_cast<float*>(evals));
    default:
      return solve_windows<std::complex<double>>(windows, count, order, in, memory_budget, static_cast<double*>(evals));
  }
}

}  // namespace farms_fast
