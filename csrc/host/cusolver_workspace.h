// What a version of cuSOLVER asks of the workspace that it is given.
#pragma once

namespace farms_fast {

// version: 1000 * major + 100 * minor + patch, as cusolverGetVersion tells it. Up to 11.7.2 the batched eigenvalue
// routine is taken to read its device workspace before it writes it, and to return wrong results unless that is zero:
// seen in 11.7.1.2, and mended in 11.7.3.90, the only release of 11.7.3.
constexpr bool needs_zeroed_workspace(int version) { return version < 11703; }

}  // namespace farms_fast
