// BLAS and LAPACK as libtorch_cpu exports them (MKL in the x86 builds). Weak, so that the library still loads, and says
// what is missing when it is called, on a build of torch without them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <complex>
#include <cstdint>

#include "csrc/op_check.h"

extern "C" {
__attribute__((weak)) void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                                  const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                                  const float* beta, float* c, const int* ldc);
__attribute__((weak)) void dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                                  const double* alpha, const double* a, const int* lda, const double* b, const int* ldb,
                                  const double* beta, double* c, const int* ldc);
__attribute__((weak)) void cgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                                  const std::complex<float>* alpha, const std::complex<float>* a, const int* lda,
                                  const std::complex<float>* b, const int* ldb, const std::complex<float>* beta,
                                  std::complex<float>* c, const int* ldc);
__attribute__((weak)) void zgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                                  const std::complex<double>* alpha, const std::complex<double>* a, const int* lda,
                                  const std::complex<double>* b, const int* ldb, const std::complex<double>* beta,
                                  std::complex<double>* c, const int* ldc);
__attribute__((weak)) void sgeqrf_(const int* m, const int* n, float* a, const int* lda, float* tau, float* work,
                                   const int* lwork, int* info);
__attribute__((weak)) void dgeqrf_(const int* m, const int* n, double* a, const int* lda, double* tau, double* work,
                                   const int* lwork, int* info);
__attribute__((weak)) void ssyevd_(const char* jobz, const char* uplo, const int* n, float* a, const int* lda, float* w,
                                   float* work, const int* lwork, int* iwork, const int* liwork, int* info);
__attribute__((weak)) void dsyevd_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda,
                                   double* w, double* work, const int* lwork, int* iwork, const int* liwork, int* info);
__attribute__((weak)) void cheevd_(const char* jobz, const char* uplo, const int* n, std::complex<float>* a,
                                   const int* lda, float* w, std::complex<float>* work, const int* lwork, float* rwork,
                                   const int* lrwork, int* iwork, const int* liwork, int* info);
__attribute__((weak)) void zheevd_(const char* jobz, const char* uplo, const int* n, std::complex<double>* a,
                                   const int* lda, double* w, std::complex<double>* work, const int* lwork,
                                   double* rwork, const int* lrwork, int* iwork, const int* liwork, int* info);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
}

namespace farms_fast {

// To be asked before a parallel region is entered: an error raised inside one loses its message on the way out.
inline void require_lapack(const char* op) {
  FARMS_CHECK(zgemm_ != nullptr && zheevd_ != nullptr && dgeqrf_ != nullptr, op, "device",
              "expected a build of torch that exports BLAS and LAPACK for the CPU, got one without");
}

// The type of a matrix's eigenvalues.
template <typename T>
struct RealOf {
  using type = T;
};
template <typename T>
struct RealOf<std::complex<T>> {
  using type = T;
};

// While it lives, MKL calls of this thread run on one thread: the batch is parallel outside.
class SingleThreadedBlas {
 public:
  SingleThreadedBlas() {
    // When a thread first asks torch for the number of threads, torch tells MKL, which must not happen later.
    torch::stable::get_num_threads();
    if (MKL_Set_Num_Threads_Local) previous_ = MKL_Set_Num_Threads_Local(1);
  }
  ~SingleThreadedBlas() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(previous_);
  }
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace farms_fast
