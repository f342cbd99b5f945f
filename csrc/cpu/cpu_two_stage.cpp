// The first stage, dense (order, order) to a band of half-width 32 by matrix products, and the two stages in a row. All
// matrices are column-major.
#include "csrc/cpu/cpu_two_stage.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "csrc/cpu/cpu_gram.h"
#include "csrc/cpu/cpu_tridiagonal.h"
#include "csrc/cpu/lapack.h"

namespace farms_fast {
namespace {

int geqrf(int m, int n, float* a, int lda, float* tau, float* work, int lwork) {
  int info = 0;
  sgeqrf_(&m, &n, a, &lda, tau, work, &lwork, &info);
  return info;
}

int geqrf(int m, int n, double* a, int lda, double* tau, double* work, int lwork) {
  int info = 0;
  dgeqrf_(&m, &n, a, &lda, tau, work, &lwork, &info);
  return info;
}

template <typename T>
void multiply(const char* ta, const char* tb, int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t lda,
              const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  const int mi = static_cast<int>(m), ni = static_cast<int>(n), ki = static_cast<int>(k);
  const int la = static_cast<int>(lda), lb = static_cast<int>(ldb), lc = static_cast<int>(ldc);
  gemm(ta, tb, &mi, &ni, &ki, &alpha, a, &la, b, &lb, &beta, c, &lc);
}

// Calls body(column, columns) for the column tiles that triangle_tiles cuts as well. Diagonal blocks are kept whole.
template <typename Body>
void over_tiles(int64_t begin, int64_t end, const Body& body) {
  for (int64_t j = begin; j < end;) {
    const int64_t next = std::min(end, (j / tile_columns + 1) * tile_columns);
    body(j, next - j);
    j = next;
  }
}

template <typename T>
void complete_diagonal_tiles(T* a, int64_t order) {
  over_tiles(0, order, [&](int64_t begin, int64_t columns) {
    for (int64_t j = begin; j < begin + columns; ++j)
      for (int64_t i = j + 1; i < begin + columns; ++i) a[i * order + j] = a[j * order + i];
  });
}

// A product of `count` reflectors is I - V T V^T. Fills t from their factors and products = V^T V.
template <typename T>
void reflector_factor(const T* tau, const T* products, int64_t count, T* t) {
  std::fill(t, t + count * count, T(0));
  for (int64_t j = 0; j < count; ++j) {
    t[j * count + j] = tau[j];
    for (int64_t k = 0; k < j; ++k) {
      const T factor = -tau[j] * products[j * count + k];
      for (int64_t i = 0; i <= k; ++i) t[j * count + i] += t[k * count + i] * factor;
    }
  }
}

// Elements of the first stage's workspace: [W | V | X], small matrices, and what LAPACK's QR takes.
constexpr int64_t reduction_elements(int64_t order) { return 4 * order * band_width + 7 * band_width * band_width; }

// Dense to band: per panel of columns, a QR factorisation of what lies below the band, and both sides' update of the
// rest. Only the lower triangle is kept, up to whole tiles on the diagonal.
template <typename T>
class BandReduction {
 public:
  BandReduction(T* a, int64_t order, T* work)
      : a_(a),
        order_(order),
        vectors_(work),
        small_(vectors_ + 3 * order * band_width),
        tau_(small_ + 6 * band_width * band_width),
        scratch_(tau_ + band_width) {}

  void run() {
    complete_diagonal_tiles(a_, order_);
    for (int64_t j = 0; j + band_width + 1 < order_; j += band_width) reduce_panel(j);
  }

 private:
  // Leaves R in the band and updates what is right of the panel's columns.
  void reduce_panel(int64_t column) {
    const int64_t top = column + band_width, rows = order_ - top, count = std::min(rows, band_width);
    T* panel = a_ + column * order_ + top;
    geqrf(static_cast<int>(rows), static_cast<int>(band_width), panel, static_cast<int>(order_), tau_, scratch_,
          static_cast<int>(order_ * band_width));
    // [W | V | X], and [W | V | W] for the update, so that [V W] and [W V] are matrices too.
    T* w = vectors_;
    T* v = w + rows * count;
    T* x = v + rows * count;
    for (int64_t j = 0; j < count; ++j) {
      std::fill(v + j * rows, v + j * rows + j, T(0));
      v[j * rows + j] = 1;
      std::copy(panel + j * order_ + j + 1, panel + j * order_ + rows, v + j * rows + j + 1);
    }
    multiply_by_rest(top, rows, count, v, x);
    rank_two_factor(rows, count, w, v);
    std::copy(w, w + rows * count, x);
    const std::vector<TriangleTile> tiles = triangle_tiles(top, order_);
    in_turn<NoState>(static_cast<int64_t>(tiles.size()), work(rows, count), [&](int64_t t, NoState&) {
      const TriangleTile& tile = tiles[static_cast<size_t>(t)];
      multiply<T>("N", "T", tile.rows, tile.columns, 2 * count, -1, v + tile.row - top, rows, w + tile.column - top,
                  rows, 1, a_ + tile.column * order_ + tile.row, order_);
    });
  }

  static double work(int64_t rows, int64_t count) {
    return 2.0 * static_cast<double>(rows) * static_cast<double>(rows) * static_cast<double>(count);
  }

  // x = C v, where C is the symmetric matrix from row and column `top` on. Each tile of x by itself: what is left of
  // its diagonal block and that block are rows of the lower triangle, what is right of them is a column below.
  void multiply_by_rest(int64_t top, int64_t rows, int64_t count, const T* v, T* x) {
    std::vector<TriangleTile> tiles;
    over_tiles(top, order_, [&](int64_t i, int64_t height) { tiles.push_back({i, top, height, i + height - top}); });
    in_turn<NoState>(static_cast<int64_t>(tiles.size()), work(rows, count), [&](int64_t t, NoState&) {
      const TriangleTile& tile = tiles[static_cast<size_t>(t)];
      const int64_t end = tile.row + tile.rows, below = order_ - end;
      T* to = x + tile.row - top;
      multiply<T>("N", "N", tile.rows, count, tile.columns, 1, a_ + top * order_ + tile.row, order_, v, rows, 0, to,
                  rows);
      if (below > 0)
        multiply<T>("T", "N", tile.rows, count, below, 1, a_ + tile.row * order_ + end, order_, v + end - top, rows, 1,
                    to, rows);
    });
  }

  // With Q = I - V T V^T, and X = C V behind v, the w for which Q^T C Q = C - V w^T - w V^T.
  void rank_two_factor(int64_t rows, int64_t count, T* w, const T* v) {
    const int64_t square = count * count;
    T* products = small_;  // V^T [V X]
    T* t = products + 2 * square;
    T* factors = t + square;  // [-M/2; T] with M = T^T (V^T X) T
    T* half = factors + 2 * square;
    multiply<T>("T", "N", count, 2 * count, rows, 1, v, rows, v, rows, 0, products, count);
    reflector_factor(tau_, products, count, t);
    multiply<T>("N", "N", count, count, count, 1, products + square, count, t, count, 0, half, count);
    multiply<T>("T", "N", count, count, count, T(-0.5), t, count, half, count, 0, factors, 2 * count);
    for (int64_t j = 0; j < count; ++j) std::copy(t + j * count, t + (j + 1) * count, factors + j * 2 * count + count);
    multiply<T>("N", "N", rows, count, 2 * count, 1, v, rows, factors, 2 * count, 0, w, rows);
  }

  T* a_;
  int64_t order_;
  T* vectors_;
  T* small_;
  T* tau_;
  T* scratch_;
};

template <typename T>
void pack_band(const T* a, int64_t order, T* band) {
  std::fill(band, band + band_elements(order), T(0));
  for (int64_t j = 0; j < order; ++j)
    for (int64_t i = j; i < std::min(order, j + band_width + 1); ++i) band[j * band_stride + i] = a[j * order + i];
}

// Divides by a power of two, whose exponent it returns, where squares of the elements could overflow or all underflow.
template <typename T>
int scale_into_range(T* a, int64_t order) {
  T largest = 0;
  for (int64_t j = 0; j < order; ++j)
    for (int64_t i = j; i < order; ++i) largest = std::max(largest, std::abs(a[j * order + i]));
  constexpr T limit = std::is_same_v<T, double> ? T(1e100) : T(1e10);
  if (largest == 0 || (largest <= limit && largest >= 1 / limit)) return 0;
  int exponent = 0;
  std::frexp(largest, &exponent);
  for (int64_t j = 0; j < order; ++j)
    for (int64_t i = j; i < order; ++i) a[j * order + i] = std::ldexp(a[j * order + i], -exponent);
  return exponent;
}

}  // namespace

int64_t two_stage_workspace(int64_t order) { return std::max(reduction_elements(order), band_elements(order)); }

template <typename T>
bool two_stage_eigenvalues(T* a, int64_t order, T* work, double* tridiagonal, T* evals) {
  const int exponent = scale_into_range(a, order);
  BandReduction<T>(a, order, work).run();
  pack_band(a, order, work);
  band_to_tridiagonal(work, order, tridiagonal, tridiagonal + order);
  if (!tridiagonal_eigenvalues(tridiagonal, tridiagonal + order, order)) return false;
  for (int64_t i = 0; i < order; ++i) evals[i] = static_cast<T>(std::ldexp(tridiagonal[i], exponent));
  return true;
}

template bool two_stage_eigenvalues(float*, int64_t, float*, double*, float*);
template bool two_stage_eigenvalues(double*, int64_t, double*, double*, double*);

}  // namespace farms_fast
