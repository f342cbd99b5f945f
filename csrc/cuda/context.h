// The caller's device and stream, and workspace from torch's caching allocator.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "csrc/allocate.h"
#include "csrc/op_check.h"

namespace farms_fast {

// While it lives, the tensor's device is the current one; `stream` is torch's current stream on it.
class CudaContext {
 public:
  explicit CudaContext(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), device_(tensor.device()) {
    void* handle = nullptr;
    // The headers' own macro for this changed its name between torch versions.
    if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle) != 0)
      fail("cuda: torch gave no current stream for device ", tensor.get_device_index());
    stream_ = static_cast<cudaStream_t>(handle);
  }

  cudaStream_t stream() const { return stream_; }

  // Uninitialised device memory that the caching allocator takes back when the tensor goes.
  torch::stable::Tensor bytes(int64_t count) const {
    return allocate({count}, torch::headeronly::ScalarType::Byte, device_);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::Device device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace farms_fast
