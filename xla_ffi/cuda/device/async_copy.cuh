// Copies into shared memory that run while the thread goes on.
#pragma once

#include <cstdint>

namespace freeio::cuda {

// Starts a copy of 4, 8 or 16 bytes. Only this thread may read them, after wait_for_copies().
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(kBytes)
                 : "memory");
  }
}

// The same `kCopies` times, each `kStep` bytes further. `global`: of the copy with number
// `kMiddle`, so that its distance from the others fits into the instruction. It takes one address
// for all.
template <int kBytes, int kCopies, int kStep, int kMiddle>
__device__ inline void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 8 || kBytes == 16);
  if constexpr (kCopies > 1) copy_async<kBytes, kCopies - 1, kStep, kMiddle>(shared, global);
  constexpr int kTo = (kCopies - 1) * kStep;
  constexpr int kFrom = (kCopies - 1 - kMiddle) * kStep;
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(target), "l"(global),
                 "n"(kTo), "n"(kFrom)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0 + %2], [%1 + %3], 8;" ::"r"(target), "l"(global),
                 "n"(kTo), "n"(kFrom)
                 : "memory");
  }
}

// Makes a group of the copies that this thread has started since its last group. It may be empty.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all groups of this thread have arrived, except for the last `kGroups`.
template <int kGroups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace freeio::cuda
