// What a multiprocessor of Hopper has (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability",
// 9.0). The configs of kernels say against it what they take.
#pragma once

namespace farms_fast {
namespace hopper {

constexpr int kRegisters = 64 << 10;              // of 32 bits
constexpr int kProcessorSharedBytes = 228 << 10;  // of all blocks
constexpr int kBlockSharedBytes = 227 << 10;      // of one block, at most
constexpr int kReservedSharedBytes = 1 << 10;     // of each block, for the system
constexpr int kMaxClusterBlocks = 8;              // that every device with clusters takes

// What the compiler may give to each thread of so many blocks of so many warps: registers go out by eights, to warps by
// fours, and no thread takes more than 255.
constexpr int registers_per_thread(int warps, int blocks) {
  const int shared = kRegisters / (32 * ((warps * blocks + 3) / 4 * 4)) / 8 * 8;
  return shared < 255 ? shared : 255;
}

constexpr bool shared_memory_holds(int blocks, int bytes) {
  return bytes <= kBlockSharedBytes && blocks * (bytes + kReservedSharedBytes) <= kProcessorSharedBytes;
}

}  // namespace hopper
}  // namespace farms_fast
