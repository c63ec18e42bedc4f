// What all host code of the engine needs around calls of CUDA's runtime: errors as Status, the
// calling thread's GPU, and calls that do not disturb XLA's stream captures.
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

// For a scope, lets the calling thread make calls that CUDA otherwise refuses while a stream is
// captured. XLA may capture a stream on any thread, this one included, and a refused call would
// also spoil the capture. This is for calls that have nothing to do with the capture, so not for
// launches.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ =
      cudaStreamCaptureModeRelaxed;  // in the scope: the thread's mode outside
};

}  // namespace freeio::cuda
