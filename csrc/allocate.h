// Memory for results and workspace, from torch's allocator of the device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace farms_fast {

// An uninitialised tensor. Where there is no memory for it the error says so in words that farms_fast/core/ops.py makes
// torch's own OutOfMemoryError of: torch::stable::empty loses what was wrong, and puts its message together with
// iostreams (see check.h).
inline torch::stable::Tensor allocate(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type,
                                      const torch::stable::Device& device) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(torch::headeronly::IntHeaderOnlyArrayRef(sizes)),
                                    from(std::optional(type)),
                                    from(std::optional<torch::headeronly::Layout>()),
                                    from(std::optional(device)),
                                    from(std::optional<bool>()),
                                    from(std::optional<torch::headeronly::MemoryFormat>())};
  if (torch_call_dispatcher("aten::empty", "memory_format", stack.data(), TORCH_ABI_VERSION) != 0) {
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error("farms_fast: out of memory for a tensor of shape (" + shape + ")");
  }
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace farms_fast
