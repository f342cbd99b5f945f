// What a solver needs for windows that are solved in one call.
#pragma once

#include <cstdint>
#include <string>

namespace farms_fast {

struct SolverFacts {
  std::string solver;       // its name; of "auto", the one that it stands for
  int64_t max_batch;        // windows that are solved at a time, at most
  int64_t matrix_bytes;     // of the Gram matrix of one window; 0 where it never leaves the chip
  int64_t workspace_bytes;  // for max_batch of them, besides the matrices
};

}  // namespace farms_fast
