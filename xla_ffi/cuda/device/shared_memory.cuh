// Shared memory whose size the launch decides.
#pragma once

namespace freeio::cuda {

// The CTA's dynamic shared memory, aligned for 16-byte accesses.
template <typename T>
__device__ T* dynamic_shared_memory() {
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared);
}

}  // namespace freeio::cuda
