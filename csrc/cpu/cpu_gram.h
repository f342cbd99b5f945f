// Gram matrix of one window, for the CPU ops that form it and for those that go on to its eigenvalues.
#pragma once

#include <algorithm>
#include <complex>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "csrc/cpu/lapack.h"
#include "csrc/gram.h"
#include "csrc/op_check.h"

namespace farms_fast {

// Scratch that is not initialised: it is overwritten anyhow, and touching it twice would cost a pass over memory.
template <typename T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (count > capacity_) {
      // MKL gives the same bits again only on data aligned the same way.
      constexpr size_t alignment = 64;
      const size_t bytes = (sizeof(T) * static_cast<size_t>(count) + alignment - 1) / alignment * alignment;
      storage_.reset(static_cast<T*>(std::aligned_alloc(alignment, bytes)));
      if (!storage_) throw std::bad_alloc();
      capacity_ = count;
    }
    return storage_.get();
  }

  T* data() const { return storage_.get(); }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T, Free> storage_;
  int64_t capacity_ = 0;
};

// Copies a window into packed (order, inner), converted to T.
template <typename T>
void pack_window(const WindowView& window, int64_t order, DType in, T* packed);

inline void gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha,
                 const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                 const int* ldc) {
  sgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
inline void gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k, const double* alpha,
                 const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
                 const int* ldc) {
  dgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
inline void gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                 const std::complex<float>* alpha, const std::complex<float>* a, const int* lda,
                 const std::complex<float>* b, const int* ldb, const std::complex<float>* beta, std::complex<float>* c,
                 const int* ldc) {
  cgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
inline void gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                 const std::complex<double>* alpha, const std::complex<double>* a, const int* lda,
                 const std::complex<double>* b, const int* ldb, const std::complex<double>* beta,
                 std::complex<double>* c, const int* ldc) {
  zgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// Whether the products can read a window where it is.
template <typename T>
bool usable_in_place(const WindowView& window, DType in) {
  constexpr DType native = std::is_same_v<T, double> ? DType::f64 : DType::f32;
  return std::is_floating_point_v<T> && in == native && window.element_stride == 1 &&
         window.vector_stride >= window.inner && window.vector_stride <= INT32_MAX;
}

// Fills the triangle of gram (order, order) that is the lower one in column-major order, the upper one in row-major.
// Block columns halve the work of a full product; MKL's syrk is not exported by libtorch_cpu.
template <typename T>
void gram_triangle(const WindowView& window, int64_t order, DType in, Scratch<T>& scratch, T* gram) {
  const int64_t inner = window.inner;
  const T* vectors = nullptr;
  int ld = 0;
  if (usable_in_place<T>(window, in)) {
    vectors = static_cast<const T*>(window.data);
    ld = static_cast<int>(std::max<int64_t>(window.vector_stride, 1));
  } else {
    T* packed = scratch.reserve(order * inner);
    pack_window(window, order, in, packed);
    vectors = packed;
    ld = static_cast<int>(inner);
  }
  constexpr int64_t block = 128;
  const T one(1), zero(0);
  const int depth = static_cast<int>(inner), ldc = static_cast<int>(order);
  const char* transposed = std::is_floating_point_v<T> ? "T" : "C";
  for (int64_t j = 0; j < order; j += block) {
    const int m = static_cast<int>(order - j), n = static_cast<int>(std::min(block, order - j));
    const T* from = vectors + j * ld;
    gemm(transposed, "N", &m, &n, &depth, &one, from, &ld, from, &ld, &zero, gram + j * order + j, &ldc);
  }
}

}  // namespace farms_fast
