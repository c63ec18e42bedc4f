// Twin of xla_ffi/cuda/device/async_copy.cuh: the same names, on the machine.
#pragma once

#include "machine.h"

namespace freeio::cuda {

template <int kBytes>
void copy_async(void* shared, const void* global) {
  emulator::start_copy(shared, global, kBytes);
}

template <int kBytes, int kCopies, int kStep, int kMiddle>
void copy_async(void* shared, const void* global) {
  for (int i = 0; i < kCopies; ++i) {
    emulator::start_copy(static_cast<char*>(shared) + i * kStep,
                         static_cast<const char*>(global) + (i - kMiddle) * kStep, kBytes);
  }
}

inline void commit_copies() { emulator::commit_copies(); }

template <int kGroups>
void wait_for_copies() {
  emulator::wait_for_copies(kGroups);
}

}  // namespace freeio::cuda
