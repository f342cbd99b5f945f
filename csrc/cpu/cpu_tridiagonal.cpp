// Tridiagonal to eigenvalues: QL without square roots on the squares of the off-diagonal elements. diagonal and
// off_diagonal: (order,), element i of the latter couples rows i and i + 1.
#include "csrc/cpu/cpu_tridiagonal.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace farms_fast {
namespace {

// Two divisions in one instruction.
typedef double Pair __attribute__((vector_size(16)));

constexpr double epsilon = std::numeric_limits<double>::epsilon() / 2;
// Below this fraction of its row's norm squared a squared pivot counts as zero; its square does not underflow above it.
constexpr double vanishing = 1e-140;

// The eigenvalue of [[a, b], [b, c]] closer to a, b squared given and positive.
double shift_near(double a, double squared, double c) {
  const double b = std::sqrt(squared), half = (c - a) / (2 * b);
  return a - b / (half + std::copysign(std::sqrt(half * half + 1), half));
}

// One implicit QL sweep with the given shift over rows first..last, without square roots: `squared` holds the squares
// of the off-diagonal elements (Pal, Walker and Kahan's variant; Parlett, The Symmetric Eigenvalue Problem, 8.15).
void sweep(double* d, double* squared, int64_t first, int64_t last, double shift) {
  // gamma is the pivot before its rotation, p = gamma^2 / cosine the squared one after it.
  double sine = 0, gamma = d[last] - shift, p = gamma * gamma, p_before = 1, r_before = 1;
  for (int64_t i = last - 1; i >= first; --i) {
    const double b = squared[i], r = p + b, value = d[i];
    if (i + 1 < last) squared[i + 1] = sine * r;
    // In cosine = p / r, gamma = cosine (value - shift) - sine gamma, p = gamma^2 / cosine one division waits for
    // another, which is what bounds the loop; over a common denominator none does.
    const double numerator = p * (value - shift) - b * gamma;
    const Pair quotients = Pair{numerator, b} / Pair{r, r};
    const double next = quotients[0];
    d[i + 1] = gamma + (value - next);
    sine = quotients[1];
    const double after = p > vanishing * r ? numerator * numerator / (r * p) : p_before / r_before * b;
    p_before = p > vanishing * r ? p : 0;
    r_before = r;
    p = after;
    gamma = next;
  }
  squared[first] = sine * p;
  d[first] = shift + gamma;
}

// Eigenvalues of the unreduced rows begin..end-1.
bool solve_block(double* d, double* squared, int64_t begin, int64_t end, double negligible, int64_t& sweeps) {
  // QL converges at the top; a matrix graded the other way is turned around first.
  if (std::abs(d[end - 1]) < std::abs(d[begin])) {
    std::reverse(d + begin, d + end);
    std::reverse(squared + begin, squared + end - 1);
  }
  while (begin < end) {
    int64_t last = begin;
    while (last + 1 < end &&
           squared[last] > std::max(epsilon * epsilon * std::abs(d[last]) * std::abs(d[last + 1]), negligible))
      ++last;
    if (last + 1 < end) squared[last] = 0;
    if (last == begin) {
      ++begin;
      continue;
    }
    if (last == begin + 1) {
      const double lower = shift_near(d[begin], squared[begin], d[last]);
      d[last] += d[begin] - lower;
      d[begin] = lower;
      squared[begin] = 0;
      begin += 2;
      continue;
    }
    if (--sweeps < 0) return false;
    sweep(d, squared, begin, last, shift_near(d[begin], squared[begin], d[begin + 1]));
  }
  return true;
}

}  // namespace

bool tridiagonal_eigenvalues(double* d, double* off_diagonal, int64_t order) {
  double largest = 0;
  for (int64_t i = 0; i < order; ++i) largest = std::max({largest, std::abs(d[i]), std::abs(off_diagonal[i])});
  if (largest == 0) return true;
  int exponent = 0;
  std::frexp(largest, &exponent);
  for (int64_t i = 0; i < order; ++i) {
    d[i] = std::ldexp(d[i], -exponent);
    const double e = std::ldexp(off_diagonal[i], -exponent);
    off_diagonal[i] = e * e;
  }
  // Dropping an element changes no eigenvalue by more than the element; all values are relative to the largest.
  const double negligible = epsilon * epsilon / 1024;
  int64_t sweeps = 30 * order;
  for (int64_t begin = 0; begin < order;) {
    int64_t end = begin + 1;
    while (end < order && off_diagonal[end - 1] > negligible) ++end;
    if (!solve_block(d, off_diagonal, begin, end, negligible, sweeps)) return false;
    begin = end;
  }
  for (int64_t i = 0; i < order; ++i) d[i] = std::ldexp(d[i], exponent);
  std::sort(d, d + order);
  return true;
}

}  // namespace farms_fast
