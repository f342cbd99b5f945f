// How the one-stage solver lays a matrix over the threads of a block, or of the blocks of a cluster.
#pragma once

#include "csrc/cuda/hopper.h"

namespace farms_fast {
namespace one_stage {

// What a config has beside `warps`, and `tiles`, eights of columns of a warp. A config derives from this and hides what
// it has otherwise.
struct MatrixConfig {
  static constexpr int strips = 1;          // sixteens of rows of a warp
  static constexpr int spilled_tiles = 0;   // of a warp's tiles, the first ones, in shared memory
  static constexpr int column_groups = 1;   // warps that share their rows and take the columns in turn
  static constexpr int cluster_blocks = 1;  // blocks that share the matrix
  static constexpr int blocks_per_processor = 1;
};

template <class Config>
struct MatrixShape {
  static constexpr int threads = 32 * Config::warps;
  static constexpr int rows = 16 * Config::strips * Config::warps / Config::column_groups;  // of a block
  static constexpr int all_rows = rows * Config::cluster_blocks;
  static_assert(all_rows >= 8 * Config::tiles * Config::column_groups, "a row for each column");

  // Of a thread: for its elements, two for each double, and in all.
  static constexpr int element_registers = 2 * 4 * Config::strips * (Config::tiles - Config::spilled_tiles);
  static constexpr int registers = hopper::registers_per_thread(Config::warps, Config::blocks_per_processor);
  // A pass has two to four tiles' vectors, a strip's sums and addresses under way.
  static constexpr int working_registers = 64;
  static_assert(element_registers + working_registers <= registers, "more spilled_tiles, or fewer blocks");
};

}  // namespace one_stage
}  // namespace farms_fast
