#include "cuda/launch.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "cuda/current_device.h"

namespace freeio::cuda {
namespace {

using Launch = decltype(&cuLaunchKernel);

// The driver's cuLaunchKernel; null: the driver does not have it.
Launch driver_launch() {
  static const Launch found = [] {
    constexpr unsigned kVersion = 11020;
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuLaunchKernel", &function, kVersion, cudaEnableDefault, &result);
    const bool is_there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return is_there ? reinterpret_cast<Launch>(function) : nullptr;
  }();
  return found;
}

}  // namespace

Status LoadedKernel::load(const Kernel& kernel, LoadedKernel& loaded) {
  RelaxedCapture relaxed;  // XLA may be capturing the launch that this is for
  if (driver_launch() == nullptr) {
    return {Code::kInternal, "freeio_jax: NVIDIA's driver has no cuLaunchKernel."};
  }
  cudaFunction_t function = nullptr;
  const cudaError_t error = cudaGetFuncBySymbol(&function, kernel.function);
  loaded.kernel_ = kernel;
  loaded.function_ = function;
  return cuda_status(error, "cudaGetFuncBySymbol");
}

Status LoadedKernel::launch(uint32_t ctas, int32_t num_experts, void* params, void* stream) const {
  void* arguments[] = {params};
  const CUresult result = driver_launch()(static_cast<CUfunction>(function_), ctas, 1, 1,
                                          static_cast<unsigned>(threads_per_cta()), 1, 1,
                                          static_cast<unsigned>(kernel_.shared_bytes),
                                          static_cast<CUstream>(stream), arguments, nullptr);
  return result == CUDA_SUCCESS ? Status{} : explain(result, num_experts);
}

Status LoadedKernel::explain(int error, int32_t num_experts) const {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel_.function) == cudaSuccess &&
      kernel_.shared_bytes > static_cast<size_t>(attributes.maxDynamicSharedSizeBytes)) {
    return {Code::kInvalidArgument,
            "freeio_jax: a kernel of this call, with num_experts=" + std::to_string(num_experts) +
                ", needs " + std::to_string(kernel_.shared_bytes) +
                " bytes of shared memory, and this GPU has " +
                std::to_string(attributes.maxDynamicSharedSizeBytes) +
                " for it. Use a GPU that has more (A100, H100, B200), or fewer experts."};
  }
  // The runtime and the driver number these errors alike.
  return cuda_status(static_cast<cudaError_t>(error), "cuLaunchKernel");
}

}  // namespace freeio::cuda
