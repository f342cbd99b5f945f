// Tables travel to the device as kernel parameters: no host buffer has to outlive the call, nothing synchronises, and
// the copy can be captured in a graph.
#include "../gram.h"
#include "check.h"

namespace farms_fast {
namespace {

// As much as a kernel's parameters hold, the rest of them left out: 32,764 bytes since CUDA 12.1, 4,096 before.
constexpr int64_t kWordsPerLaunch = CUDART_VERSION >= 12010 ? 4000 : 480;
constexpr int kThreads = 256;

struct Words {
  int64_t words[kWordsPerLaunch];
};

__global__ void store_words_kernel(const __grid_constant__ Words words, int count, int64_t* table) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) table[i] = words.words[i];
}

}  // namespace

void store_table_cuda(const int64_t* words, int64_t count, void* table, void* stream) {
  for (int64_t begin = 0; begin < count; begin += kWordsPerLaunch) {
    const int part = static_cast<int>(count - begin < kWordsPerLaunch ? count - begin : kWordsPerLaunch);
    Words batch = {};
    for (int i = 0; i < part; ++i) batch.words[i] = words[begin + i];
    store_words_kernel<<<(part + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        batch, part, static_cast<int64_t*>(table) + begin);
    FARMS_LAUNCH_CHECK();
  }
}

}  // namespace farms_fast
