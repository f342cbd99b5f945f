// What can be told of the CUDA eigenvalue solvers without CUDA: their names, the largest orders and batches that they
// take on a device, their workspace, and which of them "auto" stands for. The CUDA library goes by it, and so does a
// plan for a GPU that is not there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "csrc/cuda/hopper.h"
#include "csrc/dtype.h"
#include "csrc/host/measured_choice.h"
#include "csrc/host/solver_facts.h"
#include "csrc/host/two_stage_workspace.h"
#include "csrc/op_check.h"
#include "csrc/solver_choices.h"

namespace farms_fast {

// What of a GPU decides which solvers it can run.
struct CudaDevice {
  int architecture;      // 10 * major + minor of its compute capability
  int64_t shared_bytes;  // of shared memory that a block may ask for
  int cluster_blocks;    // that a cluster may have, 1 where there are none
  int processors;        // multiprocessors
  int index = -1;        // among those that are there
};

// By the technical specifications of the CUDA C++ Programming Guide. An architecture younger than those counts as the
// smallest of its like.
constexpr CudaDevice cuda_device(int architecture) {
  const auto kibibytes = [&]() -> int64_t {
    if (architecture == 80 || architecture == 87) return 163;
    if (architecture >= 90 && architecture < 120) return 227;
    if (architecture > 80) return 99;
    return architecture == 75 ? 64 : architecture >= 70 ? 96 : 48;
  };
  return {architecture, kibibytes() << 10, architecture >= 90 ? hopper::kMaxClusterBlocks : 1, /*processors=*/1};
}
static_assert(cuda_device(90).shared_bytes == hopper::kBlockSharedBytes);

// A solver works on Gram matrices in place, unless it is a direct one, which reads windows where they are.
struct CudaSolverTraits {
  const char* name;

  // The largest order that it takes; 0 where it takes no Gram matrices of this type.
  int64_t (*max_order)(const CudaDevice& device, DType gram);

  // Of a direct solver, the largest order of windows that it reads by itself; of larger ones it is given the Gram
  // matrices, in float64. Null for the others.
  int64_t (*max_window_order)(DType gram);

  // The largest batch that one call takes.
  int64_t (*max_batch)(int64_t order);

  // Bytes of device workspace for a batch. Never less for a larger batch.
  int64_t (*workspace_bytes)(int64_t batch, int64_t order, DType gram);
};

// The largest real matrix that the one-stage solver keeps in one block, which asks for so much shared memory.
constexpr int one_block_order(int64_t shared_bytes) {
  return shared_bytes >= 112 << 10 ? 160 : shared_bytes >= 90 << 10 ? 128 : 104;
}

constexpr int kClusterOrder = 512;  // likewise in a cluster of blocks

inline int64_t one_stage_max_order(const CudaDevice& device, DType gram) {
  const bool in_clusters = device.cluster_blocks > 1 && device.shared_bytes >= hopper::kBlockSharedBytes;
  return (in_clusters ? kClusterOrder : one_block_order(device.shared_bytes)) / reals(gram);
}

// Up to this order forming the Gram matrix in the cluster measured no slower.
inline int64_t one_stage_max_window_order(DType gram) { return 256 / reals(gram); }

// Its products are the tensor cores', in float64, which Ampere was the first to have.
inline int64_t two_stage_max_order(const CudaDevice& device, DType gram) {
  return device.architecture >= 80 ? 16384 / reals(gram) : 0;
}

inline int64_t two_stage_workspace_bytes(int64_t batch, int64_t order, DType gram) {
  return static_cast<int64_t>(lay_out_two_stage(nullptr, batch, order * reals(gram), gram).bytes);
}

inline int64_t cusolver_max_order(const CudaDevice&, DType) { return 46340; }  // whose square is the last in 32 bits

inline int64_t cusolver_max_batch(int64_t order) {
  // Element counts are 32-bit inside the routine, and it refuses batches a little above 32,000.
  const int64_t elements = std::numeric_limits<int32_t>::max();
  return std::clamp<int64_t>(elements / (order * order), 1, 16384);
}

// An estimate: the library itself tells only on a device. It asks for 0.5 to 0.75 MB for every small matrix; for large
// ones, assumed as much again as the matrix takes.
inline int64_t cusolver_workspace_estimate(int64_t batch, int64_t order, DType gram) {
  constexpr int64_t small_matrix = int64_t{1} << 20;
  return batch * (order * order * static_cast<int64_t>(item_size(gram)) + small_matrix);
}

inline constexpr CudaSolverTraits kCusolver{"cusolver", cusolver_max_order, nullptr, cusolver_max_batch,
                                            cusolver_workspace_estimate};
inline constexpr CudaSolverTraits kOneStage{"one_stage", one_stage_max_order, one_stage_max_window_order,
                                            [](int64_t) { return std::numeric_limits<int64_t>::max(); },
                                            [](int64_t, int64_t, DType) { return int64_t{0}; }};
inline constexpr CudaSolverTraits kTwoStage{"two_stage", two_stage_max_order, nullptr,
                                            [](int64_t) { return int64_t{16384}; }, two_stage_workspace_bytes};
inline constexpr const CudaSolverTraits* kCudaSolvers[] = {&kCusolver, &kOneStage, &kTwoStage};

// Whose measurements an architecture goes by: data-centre Blackwell has all that Hopper has.
constexpr int measured_architecture(int architecture) {
  return architecture > 90 && architecture < 120 ? 90 : architecture;
}

// As many complex matrices as leave a device idle: at twice the order, the two-stage solver then took longer than
// cuSOLVER on an H200.
constexpr int64_t kFewComplex = 2;

// Where nothing was measured: the one-stage solver for what one block holds, and the two-stage one beyond. Both pass
// over a matrix far less often than cuSOLVER's tridiagonalisation, whatever the rate of the arithmetic; on an H200 the
// code of 8.0 took .7 to .8 of cuSOLVER's time for one real matrix of order 1000 to 4096, and an eighth for many.
// Before Ampere there are no float64 tensor cores for them to win by.
inline const char* modelled_choice(const CudaDevice& device, int64_t count, int64_t order, DType gram) {
  if (device.architecture < 80) return kCusolver.name;
  if (order <= one_block_order(device.shared_bytes) / reals(gram)) return kOneStage.name;
  if (is_complex(gram) && count <= kFewComplex) return kCusolver.name;
  return order <= two_stage_max_order(device, gram) ? kTwoStage.name : kCusolver.name;
}

// By what was measured on that GPU, then by the table of its architecture, then by the model. A row for a solver that
// does not take such matrices here says nothing.
inline const char* auto_choice(const CudaDevice& device, int64_t count, int64_t order, DType gram) {
  const char* measured[] = {choice_of_device(device.index, count, order, gram),
                            measured_choice(measured_architecture(device.architecture), count, order, gram)};
  for (const char* name : measured)
    for (const CudaSolverTraits* solver : kCudaSolvers)
      if (name != nullptr && std::string(name) == solver->name && order <= solver->max_order(device, gram)) return name;
  return modelled_choice(device, count, order, gram);
}

// The solver of that name, or for "auto" the one that measured fastest for `count` matrices. `op` is for the error of
// one that does not exist or does not take such matrices.
inline const CudaSolverTraits& cuda_solver(const char* op, const std::string& name, const CudaDevice& device,
                                           int64_t count, int64_t order, DType gram) {
  const std::string wanted = name == "auto" ? auto_choice(device, count, order, gram) : name;
  std::string known = "auto";
  for (const CudaSolverTraits* solver : kCudaSolvers) {
    if (wanted == solver->name) {
      const int64_t most = solver->max_order(device, gram);
      FARMS_CHECK(order <= most, op, "solver", "expected one that takes order ", order,
                  is_complex(gram) ? " complex" : " real", ", got ", name, ", which takes up to ", most);
      return *solver;
    }
    known += std::string(", ") + solver->name;
  }
  fail(op, ": argument 'solver': expected one of ", known, " on CUDA, got ", name);
}

// gram: the type of the Gram matrices that window_eigvalsh is asked for.
inline SolverFacts cuda_solver_facts(const CudaSolverTraits& solver, int64_t count, int64_t order, DType gram) {
  const int64_t batch = std::min(count, solver.max_batch(order));
  const bool direct = solver.max_window_order != nullptr;
  if (direct && order <= solver.max_window_order(gram)) return {solver.name, batch, 0, 0};
  const DType stored = direct ? gram_dtype(gram, DType::f64) : gram;
  return {solver.name, batch, order * order * static_cast<int64_t>(item_size(stored)),
          solver.workspace_bytes(batch, order, gram)};
}

}  // namespace farms_fast
