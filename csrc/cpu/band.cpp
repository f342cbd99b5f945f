// Band to tridiagonal: Householder reflectors chase the bulge of every column off the band's end.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "csrc/cpu/cpu_tridiagonal.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif
#define FARMS_FAST_INLINE __attribute__((always_inline)) inline

namespace farms_fast {
namespace {

constexpr int width = band_width;

// I - tau v v^T with v[0] = 1.
template <typename T>
struct alignas(64) ChasingReflector {
  T v[width];
  T tau;
};

// With vectors of `bytes`, which should be those of the registers: the compiler handles wider ones badly.
template <typename T, int bytes>
struct Chase {
  typedef T V __attribute__((vector_size(bytes)));
  typedef T Memory __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));  // at any address
  using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Lane Mask __attribute__((vector_size(bytes)));
  static constexpr int lanes = bytes / sizeof(T), parts = width / lanes;
  static constexpr int64_t stride = band_stride;

  static FARMS_FAST_INLINE void number_lanes(Mask& numbers) {
    for (int i = 0; i < lanes; ++i) numbers[i] = i;
  }

  static FARMS_FAST_INLINE T sum(const V& x) {
    T part[lanes / 2];
    for (int i = 0; i < lanes / 2; ++i) part[i] = x[i] + x[i + lanes / 2];
    for (int n = lanes / 4; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) part[i] += part[i + n];
    return part[0];
  }

  // Makes the reflector that leaves only the first of a column's `width` values, and applies it to that column.
  static FARMS_FAST_INLINE void reflect_column(T* column, ChasingReflector<T>& h) {
    V x[parts];
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) x[q] = *reinterpret_cast<const Memory*>(column + q * lanes);
    const T alpha = column[0];
    Mask numbers{};
    number_lanes(numbers);
    x[0] = numbers > 0 ? x[0] : V{};
    V squares = x[0] * x[0];
#pragma GCC unroll 16
    for (int q = 1; q < parts; ++q) squares += x[q] * x[q];
    const T rest = sum(squares);
    T beta = alpha, scale = 0;
    h.tau = 0;
    // The matrix is scaled such that what underflows here is far below rounding.
    if (rest > 0) {
      beta = -std::copysign(std::sqrt(alpha * alpha + rest), alpha);
      h.tau = (beta - alpha) / beta;
      scale = 1 / (alpha - beta);
    }
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) {
      *reinterpret_cast<Memory*>(h.v + q * lanes) = x[q] * scale;
      *reinterpret_cast<Memory*>(column + q * lanes) = V{};
    }
    h.v[0] = 1;
    column[0] = beta;
  }

  // `corner` is the diagonal element of the reflector's first row. Applies it to both sides of the diagonal block and
  // to the right of the block below, and replaces it by the one that restores the first column of that block.
  static FARMS_FAST_INLINE void step(T* corner, ChasingReflector<T>& h) {
    V v[parts], w[parts];
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) {
      v[q] = *reinterpret_cast<const Memory*>(h.v + q * lanes);
      w[q] = V{};
    }
    Mask numbers{};
    number_lanes(numbers);
    alignas(64) T scalar[width];
    // w = tau D v from the lower triangle. Loads that begin above the diagonal reach into the column before, hence the
    // masks.
#pragma GCC unroll 16
    for (int q0 = 0; q0 < parts; ++q0) {
      for (int lane = 0; lane < lanes; ++lane) {
        const int c = q0 * lanes + lane;
        const T* column = corner + c * stride;
        const T vc = h.v[c];
        const V first = *reinterpret_cast<const Memory*>(column + q0 * lanes);
        V part = numbers > lane ? first : V{};
        V dot = part * v[q0];
        w[q0] += part * vc;
#pragma GCC unroll 16
        for (int q = q0 + 1; q < parts; ++q) {
          part = *reinterpret_cast<const Memory*>(column + q * lanes);
          dot += part * v[q];
          w[q] += part * vc;
        }
        scalar[c] = sum(dot) + column[c] * vc;
      }
    }
    V inner{};
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) {
      w[q] = (w[q] + *reinterpret_cast<const Memory*>(scalar + q * lanes)) * h.tau;
      inner += w[q] * v[q];
    }
    const T half = sum(inner) * h.tau / 2;
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) {
      w[q] -= v[q] * half;
      *reinterpret_cast<Memory*>(scalar + q * lanes) = w[q];
    }
#pragma GCC unroll 16
    for (int q0 = 0; q0 < parts; ++q0) {
      for (int lane = 0; lane < lanes; ++lane) {
        const int c = q0 * lanes + lane;
        T* column = corner + c * stride;
        const T vc = h.v[c], wc = scalar[c];
        const V first = *reinterpret_cast<const Memory*>(column + q0 * lanes);
        *reinterpret_cast<Memory*>(column + q0 * lanes) = numbers >= lane ? first - v[q0] * wc - w[q0] * vc : first;
#pragma GCC unroll 16
        for (int q = q0 + 1; q < parts; ++q) {
          Memory* part = reinterpret_cast<Memory*>(column + q * lanes);
          *part = *part - v[q] * wc - w[q] * vc;
        }
      }
    }

    T* below = corner + width;
    V y[parts];
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) y[q] = V{};
    for (int c = 0; c < width; ++c) {
      const T vc = h.v[c];
#pragma GCC unroll 16
      for (int q = 0; q < parts; ++q) y[q] += *reinterpret_cast<const Memory*>(below + c * stride + q * lanes) * vc;
    }
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) {
      y[q] *= h.tau;
      Memory* part = reinterpret_cast<Memory*>(below + q * lanes);
      *part = *part - y[q];
    }
    ChasingReflector<T> next;
    reflect_column(below, next);
    V u[parts];
#pragma GCC unroll 16
    for (int q = 0; q < parts; ++q) u[q] = *reinterpret_cast<const Memory*>(next.v + q * lanes);
    for (int c = 1; c < width; ++c) {
      const T vc = h.v[c];
      T* column = below + c * stride;
      V part[parts], dot{};
#pragma GCC unroll 16
      for (int q = 0; q < parts; ++q) {
        part[q] = *reinterpret_cast<const Memory*>(column + q * lanes) - y[q] * vc;
        dot += part[q] * u[q];
      }
      const T factor = sum(dot) * next.tau;
#pragma GCC unroll 16
      for (int q = 0; q < parts; ++q) *reinterpret_cast<Memory*>(column + q * lanes) = part[q] - u[q] * factor;
    }
    h = next;
  }

  // Several columns' chases follow each other at a distance of one block, so that the band passes through the cache
  // once for all of them.
  static FARMS_FAST_INLINE void run(T* band, int64_t order) {
    constexpr int64_t group = 16;
    ChasingReflector<T> reflectors[group];
    for (int64_t j0 = 0; j0 + 2 < order; j0 += group) {
      const int64_t columns = std::min(group, order - 2 - j0), steps = (order - 2 - j0) / width + 1;
      for (int64_t t = 0; t < steps + columns; ++t)
        for (int64_t g = std::max<int64_t>(0, t - steps); g < std::min(columns, t + 1); ++g) {
          const int64_t j = j0 + g, first = j + 1 + (t - g) * width;
          if (first + 1 >= order) continue;
          if (t == g) reflect_column(band + j * stride + first, reflectors[g]);
          step(band + first * stride + first, reflectors[g]);
        }
    }
  }
};

// The library is built for the oldest x86-64; the instructions for this part are chosen when it runs. AVX-512 was
// tried: on Zen 4 the same time in float64, more in float32.
#ifdef __x86_64__
template <typename T>
__attribute__((target("avx2,fma"))) void chase_avx2(T* band, int64_t order) {
  Chase<T, 32>::run(band, order);
}
#endif

template <typename T>
void chase(T* band, int64_t order) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return chase_avx2(band, order);
#endif
  Chase<T, 16>::run(band, order);
}

template <typename T>
void reduce(T* band, int64_t order, double* diagonal, double* off_diagonal) {
  chase(band, order);
  for (int64_t j = 0; j < order; ++j) {
    diagonal[j] = band[j * band_stride + j];
    off_diagonal[j] = j + 1 < order ? band[j * band_stride + j + 1] : 0;
  }
}

}  // namespace

void band_to_tridiagonal(double* band, int64_t order, double* diagonal, double* off_diagonal) {
  reduce(band, order, diagonal, off_diagonal);
}

void band_to_tridiagonal(float* band, int64_t order, double* diagonal, double* off_diagonal) {
  reduce(band, order, diagonal, off_diagonal);
}

}  // namespace farms_fast
