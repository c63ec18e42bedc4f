// Twin of xla_ffi/cuda/device/shared_memory.cuh.
#pragma once

#include "machine.h"

namespace freeio::cuda {

template <typename T>
T* dynamic_shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

}  // namespace freeio::cuda
