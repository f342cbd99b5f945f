// Windows packed into (order, inner) vectors of the computation's type, and the op's Gram matrices (order, order), a
// window to a thread.
#include "csrc/cpu/cpu_gram.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "csrc/cpu/cpu_shared_gram.h"

namespace farms_fast {
namespace {

template <typename To, typename From>
To convert(const From& value) {
  if constexpr (std::is_same_v<From, std::complex<float>> || std::is_same_v<From, std::complex<double>>) {
    return To(static_cast<typename RealOf<To>::type>(value.real()),
              static_cast<typename RealOf<To>::type>(value.imag()));
  } else {
    return static_cast<To>(static_cast<double>(value));
  }
}

template <typename From, typename To>
void pack_from(const WindowView& window, int64_t order, To* packed) {
  const From* data = static_cast<const From*>(window.data);
  const int64_t inner = window.inner;
  // Walk the weight along its smaller stride: a cache line is then read once.
  if (window.element_stride <= window.vector_stride) {
    for (int64_t v = 0; v < order; ++v)
      for (int64_t t = 0; t < inner; ++t)
        packed[v * inner + t] = convert<To>(data[v * window.vector_stride + t * window.element_stride]);
  } else {
    for (int64_t t = 0; t < inner; ++t)
      for (int64_t v = 0; v < order; ++v)
        packed[v * inner + t] = convert<To>(data[v * window.vector_stride + t * window.element_stride]);
  }
}

template <typename T>
void form_grams(const Window* windows, int64_t count, int64_t order, DType in, T* gram) {
  // Sharing may take as much memory again as the result.
  const int64_t memory = count * order * order * static_cast<int64_t>(sizeof(T));
  over_gram_batches<T>(windows, count, order, in, /*either_side=*/false, memory, [&](const GramBatch<T>& batch) {
    in_turn<Scratch<T>>(batch.count(), batch.work(), [&](int64_t b, Scratch<T>& scratch) {
      T* g = gram + batch.window(b) * order * order;
      batch.triangle(b, scratch, g);
      for (int64_t i = 0; i < order; ++i)
        for (int64_t j = i + 1; j < order; ++j) {
          if constexpr (std::is_floating_point_v<T>)
            g[j * order + i] = g[i * order + j];
          else
            g[j * order + i] = std::conj(g[i * order + j]);
        }
    });
  });
}

}  // namespace

template <typename T>
void pack_window(const WindowView& window, int64_t order, DType in, T* packed) {
  if constexpr (std::is_floating_point_v<T>) {
    switch (in) {
      case DType::f16:
        return pack_from<torch::headeronly::Half>(window, order, packed);
      case DType::bf16:
        return pack_from<torch::headeronly::BFloat16>(window, order, packed);
      case DType::f32:
        return pack_from<float>(window, order, packed);
      default:
        return pack_from<double>(window, order, packed);
    }
  } else {
    if (in == DType::c64) return pack_from<std::complex<float>>(window, order, packed);
    return pack_from<std::complex<double>>(window, order, packed);
  }
}

template void pack_window(const WindowView&, int64_t, DType, float*);
template void pack_window(const WindowView&, int64_t, DType, double*);
template void pack_window(const WindowView&, int64_t, DType, std::complex<float>*);
template void pack_window(const WindowView&, int64_t, DType, std::complex<double>*);

void window_gram_cpu(const Window* windows, int64_t count, int64_t order, DType in, DType precision, void* gram) {
  require_lapack("window_gram");
  switch (gram_dtype(in, precision)) {
    case DType::f32:
      return form_grams(windows, count, order, in, static_cast<float*>(gram));
    case DType::f64:
      return form_grams(windows, count, order, in, static_cast<double*>(gram));
    case DType::c64:
      return form_grams(windows, count, order, in, static_cast<std::complex<float>*>(gram));
    default:
      return form_grams(windows, count, order, in, static_cast<std::complex<double>*>(gram));
  }
}

}  // namespace farms_fast
