// Eigenvalues of a real symmetric matrix in two stages: dense to band by matrix products, band to tridiagonal in cache.
// LAPACK's one-stage reduction reads the rest of the matrix once for every column and is bound by memory; the first
// stage here reads it twice for every panel of columns.
#pragma once

#include <cstdint>

namespace farms_fast {

// Elements of T that two_stage_eigenvalues needs as workspace.
int64_t two_stage_workspace(int64_t order);

// a: (order, order), finite, only its lower triangle in column-major order is used; destroyed.
// work: two_stage_workspace(order) elements. tridiagonal: (2, order). evals: (order,), ascending.
// False where the iteration on the tridiagonal matrix does not converge. Runs on the caller's thread, MKL's products on
// those that MKL may use.
template <typename T>
bool two_stage_eigenvalues(T* a, int64_t order, T* work, double* tridiagonal, T* evals);

}  // namespace farms_fast
