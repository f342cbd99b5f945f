// The library solver: cuSOLVER's batched tridiagonalisation and divide-and-conquer, eigenvalues only.
#include <cusolverDn.h>

#include <map>
#include <memory>

#include "csrc/cuda/check.h"
#include "csrc/cuda/eigvalsh/solver.h"
#include "csrc/host/cusolver_workspace.h"

namespace farms_fast {
namespace {

void check(cusolverStatus_t status, const char* call) {
  if (status != CUSOLVER_STATUS_SUCCESS) fail("cusolver: ", call, " returned status ", static_cast<int>(status));
}
#define FARMS_CUSOLVER_CHECK(call) check((call), #call)

struct Types {
  cudaDataType matrix;
  cudaDataType values;
};

Types types_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return {CUDA_R_32F, CUDA_R_32F};
    case DType::c64:
      return {CUDA_C_32F, CUDA_R_32F};
    case DType::c128:
      return {CUDA_C_64F, CUDA_R_64F};
    default:
      return {CUDA_R_64F, CUDA_R_64F};
  }
}

struct LibraryHandle {
  cusolverDnHandle_t handle = nullptr;
  cusolverDnParams_t params = nullptr;
  // The end of the handle's last work: what a handle keeps for itself must not serve two streams at once.
  cudaEvent_t end = nullptr;
};

// One handle per thread and device, made on first use and kept until the process ends: destroying one in a static
// destructor would call into a CUDA runtime that may be gone by then.
const LibraryHandle& library() {
  static thread_local std::map<int, LibraryHandle> handles;
  int device = 0;
  FARMS_CUDA_CHECK(cudaGetDevice(&device));
  LibraryHandle& found = handles[device];
  if (found.handle == nullptr) {
    FARMS_CUSOLVER_CHECK(cusolverDnCreate(&found.handle));
    FARMS_CUSOLVER_CHECK(cusolverDnCreateParams(&found.params));
    FARMS_CUDA_CHECK(cudaEventCreateWithFlags(&found.end, cudaEventDisableTiming));
  }
  return found;
}

struct LibraryWorkspace {
  size_t device = 0;
  size_t host = 0;
};

LibraryWorkspace query(int64_t batch, int64_t order, DType dtype) {
  const LibraryHandle& lib = library();
  const Types types = types_of(dtype);
  LibraryWorkspace bytes;
  FARMS_CUSOLVER_CHECK(cusolverDnXsyevBatched_bufferSize(
      lib.handle, lib.params, CUSOLVER_EIG_MODE_NOVECTOR, CUBLAS_FILL_MODE_LOWER, order, types.matrix, nullptr, order,
      types.values, nullptr, types.matrix, &bytes.device, &bytes.host, batch));
  return bytes;
}

int64_t workspace_bytes(int64_t batch, int64_t order, DType dtype) {
  return static_cast<int64_t>(query(batch, order, dtype).device);
}

void solve(void* gram, int64_t batch, int64_t order, DType dtype, void* workspace, void* evals, int* failed,
           cudaStream_t stream) {
  const LibraryHandle& lib = library();
  const Types types = types_of(dtype);
  const LibraryWorkspace bytes = query(batch, order, dtype);
  // The routine has returned from the host's part of its work when the call does.
  std::unique_ptr<char[]> host(bytes.host > 0 ? new char[bytes.host] : nullptr);
  FARMS_CUDA_CHECK(cudaStreamWaitEvent(stream, lib.end));
  if (needs_zeroed_workspace(cusolver_version())) FARMS_CUDA_CHECK(cudaMemsetAsync(workspace, 0, bytes.device, stream));
  FARMS_CUSOLVER_CHECK(cusolverDnSetStream(lib.handle, stream));
  FARMS_CUSOLVER_CHECK(cusolverDnXsyevBatched(
      lib.handle, lib.params, CUSOLVER_EIG_MODE_NOVECTOR, CUBLAS_FILL_MODE_LOWER, order, types.matrix, gram, order,
      types.values, evals, types.matrix, workspace, bytes.device, host.get(), bytes.host, failed, batch));
  FARMS_CUDA_CHECK(cudaEventRecord(lib.end, stream));
}

}  // namespace

int cusolver_version() {
  static const int version = [] {
    int found = 0;
    FARMS_CUSOLVER_CHECK(cusolverGetVersion(&found));
    return found;
  }();
  return version;
}

const CudaSolver& cusolver() {
  static const InPlaceSolver in_place{workspace_bytes, solve};
  static const CudaSolver solver{kCusolver, nullptr, &in_place};
  return solver;
}

}  // namespace farms_fast
