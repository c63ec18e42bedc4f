// Launches a kernel through the driver. The runtime would look the kernel up in each launch, for
// about a microsecond of the host's time.
#pragma once

#include <cstdint>

#include "core/status.h"
#include "cuda/kernels.h"

namespace freeio::cuda {

// A kernel as the driver knows it on one GPU.
class LoadedKernel {
 public:
  // On the calling thread's GPU.
  static Status load(const Kernel& kernel, LoadedKernel& loaded);

  // On `stream`, a cudaStream_t of that GPU. `params`: the kernel's only parameter. `num_experts`
  // is for the error.
  Status launch(uint32_t ctas, int32_t num_experts, void* params, void* stream) const;

 private:
  Status explain(int error, int32_t num_experts) const;

  Kernel kernel_;
  void* function_ = nullptr;  // a CUfunction
};

}  // namespace freeio::cuda
