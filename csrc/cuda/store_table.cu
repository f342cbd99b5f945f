// Tables travel to the device as kernel parameters: no host buffer has to outlive the call, nothing synchronises, and
// the copy can be captured in a graph.
#include "csrc/cuda/check.h"
#include "csrc/gram.h"

namespace farms_fast {
namespace {

// As much as a kernel's parameters hold, the rest of them left out: 32,764 bytes since CUDA 12.1, 4,096 before.
constexpr int kMostWords = CUDART_VERSION >= 12010 ? 4000 : 480;
// A launch hands over all of its parameters, so a table of a few windows has kernels of its own.
constexpr int kFewWords = 60, kSomeWords = 480;
constexpr int kStoreThreads = 256;

template <int Capacity>
struct Words {
  int64_t words[Capacity];
};

template <int Capacity>
__global__ void store_words_kernel(const __grid_constant__ Words<Capacity> words, int count, int64_t* table) {
  const int i = blockIdx.x * kStoreThreads + threadIdx.x;
  if (i < count) table[i] = words.words[i];
}

template <int Capacity>
void store(const int64_t* words, int count, int64_t* table, cudaStream_t stream) {
  Words<Capacity> parameter;
  for (int i = 0; i < Capacity; ++i) parameter.words[i] = i < count ? words[i] : 0;
  store_words_kernel<<<(count + kStoreThreads - 1) / kStoreThreads, kStoreThreads, 0, stream>>>(parameter, count,
                                                                                                table);
  FARMS_LAUNCH_CHECK();
}

}  // namespace

void store_table_cuda(const int64_t* words, int64_t count, void* table, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  for (int64_t begin = 0; begin < count; begin += kMostWords) {
    const int part = static_cast<int>(count - begin < kMostWords ? count - begin : kMostWords);
    const auto launch = part <= kFewWords    ? store<kFewWords>
                        : part <= kSomeWords ? store<kSomeWords>
                                             : store<kMostWords>;
    launch(words + begin, part, static_cast<int64_t*>(table) + begin, stream);
  }
}

}  // namespace farms_fast
