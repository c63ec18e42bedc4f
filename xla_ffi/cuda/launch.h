// Launches a kernel through CUDA's driver. CUDA's runtime would look the kernel up in each launch,
// which takes about a microsecond of the host's time.
#pragma once

#include <cstdint>

#include "core/status.h"
#include "cuda/kernels.h"

namespace freeio::cuda {

// What a launch needs beside the kernel and the stream.
struct Launch {
  uint32_t ctas;
  int32_t num_experts;  // for the error message
  void* params;         // the kernel's only parameter
};

// Whether the calling thread's GPU has the shared memory that the kernel needs.
bool fits(const Kernel& kernel);

// A kernel as the driver knows it on one GPU.
class LoadedKernel {
 public:
  // Finds the kernel on the calling thread's GPU.
  static Status load(const Kernel& kernel, LoadedKernel& loaded);

  // Launches it on `stream`, a cudaStream_t of that GPU.
  Status launch(const Launch& launch, void* stream) const;

  // Also records `begun`, a cudaEvent_t, when all CTAs of the kernel have begun; null: it does not.
  Status launch(const Launch& launch, void* stream, void* begun) const;

 private:
  Status explain(int error, int32_t num_experts) const;

  Kernel kernel_;
  void* function_ = nullptr;  // a CUfunction
};

}  // namespace freeio::cuda
