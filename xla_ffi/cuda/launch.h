// Launches a kernel through CUDA's driver. CUDA's runtime would look the kernel up in each launch,
// which takes about a microsecond of the host's time.
#pragma once

#include <cstdint>

#include "core/status.h"
#include "cuda/kernels.h"

namespace freeio::cuda {

// A kernel as the driver knows it on one GPU.
class LoadedKernel {
 public:
  // Finds the kernel on the calling thread's GPU.
  static Status load(const Kernel& kernel, LoadedKernel& loaded);

  // Launches it on `stream`, a cudaStream_t of that GPU. `params` points to the kernel's only
  // parameter. `num_experts` appears in the error message.
  Status launch(uint32_t ctas, int32_t num_experts, void* params, void* stream) const;

 private:
  Status explain(int error, int32_t num_experts) const;

  Kernel kernel_;
  void* function_ = nullptr;  // a CUfunction
};

}  // namespace freeio::cuda
