#include "cuda/launch.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "cuda/current_device.h"

namespace freeio::cuda {
namespace {

// A function of the driver, as it was in `version` of CUDA; null: the driver does not have it.
template <typename Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result);
  const bool is_there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return is_there ? reinterpret_cast<Function>(function) : nullptr;
}

auto driver_launch() {
  static const auto found = driver_function<decltype(&cuLaunchKernel)>("cuLaunchKernel", 11020);
  return found;
}

// The events that are recorded when CTAs have begun are younger than the function itself.
constexpr int kFirstWithBegun = 12030;
auto driver_launch_with_attributes() {
  static const auto found = [] {
    int version = 0;
    const cudaError_t error = cudaDriverGetVersion(&version);
    using Function = decltype(&cuLaunchKernelEx);
    return error == cudaSuccess && version >= kFirstWithBegun
               ? driver_function<Function>("cuLaunchKernelEx", kFirstWithBegun)
               : nullptr;
  }();
  return found;
}

}  // namespace

bool fits(const Kernel& kernel) {
  RelaxedCapture relaxed;  // as in load()
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel.function) == cudaSuccess &&
         kernel.shared_bytes <= static_cast<size_t>(attributes.maxDynamicSharedSizeBytes);
}

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

Status LoadedKernel::launch(const Launch& launch, void* stream) const {
  void* arguments[] = {launch.params};
  const CUresult result = driver_launch()(static_cast<CUfunction>(function_), launch.ctas, 1, 1,
                                          static_cast<unsigned>(threads_per_cta()), 1, 1,
                                          static_cast<unsigned>(kernel_.shared_bytes),
                                          static_cast<CUstream>(stream), arguments, nullptr);
  return result == CUDA_SUCCESS ? Status{} : explain(result, launch.num_experts);
}

Status LoadedKernel::launch(const Launch& launch, void* stream, void* begun) const {
  if (begun == nullptr) return this->launch(launch, stream);
  const auto launch_with_attributes = driver_launch_with_attributes();
  if (launch_with_attributes == nullptr) {
    return {Code::kInternal,
            "freeio_jax: to run an exchange beside compute takes an NVIDIA driver of CUDA 12.3 or "
            "later. Call dispatch() and combine() instead of their starts, or update the driver."};
  }
  CUlaunchAttribute attribute = {};
  attribute.id = CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT;
  attribute.value.launchCompletionEvent.event = static_cast<CUevent>(begun);
  CUlaunchConfig config = {};
  config.gridDimX = launch.ctas;
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = static_cast<unsigned>(threads_per_cta());
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned>(kernel_.shared_bytes);
  config.hStream = static_cast<CUstream>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {launch.params};
  const CUresult result =
      launch_with_attributes(&config, static_cast<CUfunction>(function_), arguments, nullptr);
  return result == CUDA_SUCCESS ? Status{} : explain(result, launch.num_experts);
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
  return cuda_status(static_cast<cudaError_t>(error), "launch of a kernel");
}

}  // namespace freeio::cuda
