// What all host code of the engine needs of CUDA's runtime: its errors, and the thread's GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "core/status.h"

namespace freeio::cuda {

inline Status cuda_status(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  return {Code::kInternal,
          std::string("freeio_jax: ") + call + ": " + cudaGetErrorString(error) + "."};
}

// Sets the calling thread's GPU for a scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal) {
    if (cudaGetDevice(&previous_) != cudaSuccess) previous_ = -1;
    error_ = cudaSetDevice(ordinal);
  }
  ~CurrentDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_;
  cudaError_t error_;
};

}  // namespace freeio::cuda
