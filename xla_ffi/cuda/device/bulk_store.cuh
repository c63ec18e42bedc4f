// Stores of many bytes from shared to global memory, also to that of a peer. One thread starts
// them. They run while it goes on, and do not hold up the loads and stores of other threads.
#pragma once

#include <cstdint>

namespace freeio::cuda {

// GPUs before Hopper have none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasBulkStores = false;
#else
constexpr bool kHasBulkStores = true;
#endif

// What this thread has written to shared memory, it or another thread that it meets at a barrier
// afterwards may store in bulk.
__device__ inline void publish_to_bulk_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts a store. Addresses and size are multiples of 16 bytes.
__device__ inline void store_bulk(void* global, const void* shared, uint32_t bytes) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(from), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all that this thread has stored in bulk has been read from shared memory.
__device__ inline void wait_for_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until it has arrived. What this thread publishes then includes it.
__device__ inline void wait_for_bulk_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace freeio::cuda
