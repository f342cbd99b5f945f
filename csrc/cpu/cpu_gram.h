// Gram matrix of one window, for the CPU ops that form it and for those that go on to its eigenvalues.
#pragma once

#include <algorithm>
#include <complex>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "csrc/cpu/cpu_parallel.h"
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

struct NoState {};

// The window from one of its vectors on.
inline WindowView part_of(WindowView window, int64_t vector, DType in) {
  window.data =
      static_cast<const char*>(window.data) + vector * window.vector_stride * static_cast<int64_t>(item_size(in));
  return window;
}

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

template <typename Real>
void add_compensated(const Real* values, int64_t count, Real* sums, Real* errors) {
  for (int64_t i = 0; i < count; ++i) {
    const Real sum = sums[i] + values[i], shadow = sum - sums[i];
    errors[i] += (sums[i] - (sum - shadow)) + (values[i] - shadow);
    sums[i] = sum;
  }
}

// sums (m, n), column-major with leading dimension lds, = or, with `add`, += the products of m vectors with n others
// over `depth` elements, `piece` of them at a time and the pieces added up without loss. ld: between vectors.
template <typename T>
void multiply_vectors(int64_t m, int64_t n, int64_t depth, int64_t piece, const T* left, const T* right, int64_t ld,
                      bool add, T* sums, int64_t lds, Scratch<T>& scratch) {
  const char* transposed = std::is_floating_point_v<T> ? "T" : "C";
  const int mi = static_cast<int>(m), ni = static_cast<int>(n), ldi = static_cast<int>(ld);
  const auto product = [&](int64_t begin, T kept, T* to, int64_t ldt) {
    const int k = static_cast<int>(std::min(piece, depth - begin)), ldc = static_cast<int>(ldt);
    const T one(1);
    gemm(transposed, "N", &mi, &ni, &k, &one, left + begin, &ldi, right + begin, &ldi, &kept, to, &ldc);
  };
  product(0, T(add ? 1 : 0), sums, lds);
  if (depth <= piece) return;
  T* part = scratch.reserve(2 * m * n);
  T* errors = part + m * n;
  std::fill(errors, errors + m * n, T(0));
  using Real = typename RealOf<T>::type;
  constexpr int64_t reals = sizeof(T) / sizeof(Real);
  for (int64_t begin = piece; begin < depth; begin += piece) {
    product(begin, T(0), part, m);
    for (int64_t j = 0; j < n; ++j)
      add_compensated(reinterpret_cast<const Real*>(part + j * m), m * reals, reinterpret_cast<Real*>(sums + j * lds),
                      reinterpret_cast<Real*>(errors + j * m));
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) sums[j * lds + i] += errors[j * m + i];
}

// Tiles that cut the lower triangle of a matrix (order, order) from row and column `begin` on. Columns are cut at
// multiples of tile_columns of the whole matrix, so that the blocks on the diagonal are the same whatever `begin`.
struct TriangleTile {
  int64_t row, column, rows, columns;
};
constexpr int64_t tile_rows = 512, tile_columns = 128;

inline std::vector<TriangleTile> triangle_tiles(int64_t begin, int64_t order) {
  std::vector<TriangleTile> tiles;
  for (int64_t j = begin; j < order;) {
    const int64_t next = std::min(order, (j / tile_columns + 1) * tile_columns);
    for (int64_t i = j; i < order; i += tile_rows) tiles.push_back({i, j, std::min(tile_rows, order - i), next - j});
    j = next;
  }
  return tiles;
}

// Fills the triangle of gram (order, order) that is the lower one in column-major order, the upper one in row-major.
// Block columns halve the work of a full product; MKL's syrk is not exported by libtorch_cpu.
template <typename T>
void gram_triangle(const WindowView& window, int64_t order, DType in, Scratch<T>& scratch, T* gram) {
  const int64_t inner = window.inner;
  const T* vectors = nullptr;
  int64_t ld = inner;
  const double work = static_cast<double>(order) * static_cast<double>(order) * static_cast<double>(inner);
  if (usable_in_place<T>(window, in)) {
    vectors = static_cast<const T*>(window.data);
    ld = std::max<int64_t>(window.vector_stride, 1);
  } else {
    T* packed = scratch.reserve(order * inner);
    constexpr int64_t together = 64;
    in_turn<NoState>((order + together - 1) / together, work, [&](int64_t part, NoState&) {
      const int64_t begin = part * together;
      pack_window(part_of(window, begin, in), std::min(together, order - begin), in, packed + begin * inner);
    });
    vectors = packed;
  }
  const std::vector<TriangleTile> tiles = triangle_tiles(0, order);
  in_turn<Scratch<T>>(static_cast<int64_t>(tiles.size()), work, [&](int64_t t, Scratch<T>& sums) {
    const TriangleTile& tile = tiles[static_cast<size_t>(t)];
    multiply_vectors(tile.rows, tile.columns, inner, summed_depth(order), vectors + tile.row * ld,
                     vectors + tile.column * ld, ld, false, gram + tile.column * order + tile.row, order, sums);
  });
}

}  // namespace farms_fast
