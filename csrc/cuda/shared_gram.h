// Gram matrices of many windows, the products that overlapping ones have in common formed once where that is faster
// (see host/gram_sharing.h).
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/gram.h"

namespace farms_fast {

// What a launch takes, made on the host.
struct GramPlan {
  std::vector<int64_t> tables;
  bool shares = false;    // some products; otherwise the tables are the windows' views
  int64_t matrices = 0;   // that the tables begin with, or windows
  int64_t longest = 0;    // elements of a window's vectors; not told where products are shared
  int64_t tiles = 0;      // to form
  int64_t blocks = 0;     // that form them
  int64_t sum_bytes = 0;  // of the sums that they keep

  int64_t workspace_bytes() const { return static_cast<int64_t>(tables.size() * sizeof(int64_t)) + sum_bytes; }
};

// windows: one chunk, in the order of its Gram matrices. either_side: see plan_gram_sharing. memory: bytes of workspace
// beyond which nothing is shared.
GramPlan plan_grams_cuda(const Window* windows, int64_t count, DType in, bool either_side, int64_t memory);

// The plan's Gram matrices on a stream, as window_gram_cuda writes them. workspace: workspace_bytes(), in device
// memory, aligned for any type. Can be captured in a graph.
void form_grams_cuda(const GramPlan& plan, int64_t order, DType in, DType precision, void* workspace, void* gram,
                     void* stream);

}  // namespace farms_fast
