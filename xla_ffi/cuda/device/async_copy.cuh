// Bulk copies into shared memory, which run while all threads go on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeio::cuda {

// GPUs before Hopper have none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasBulkCopies = false;
#else
constexpr bool kHasBulkCopies = true;
#endif
constexpr int kBulkUnit = 16;  // addresses and sizes are multiples of so many bytes

// A barrier in shared memory. A phase of it ends when one thread has arrived and the copy that this
// thread started, if any, is complete. Who sees the end of a phase by has_ended() sees what was
// copied, and everything that the thread wrote before it arrived.
class CopyBarrier {
 public:
  // One thread. publish_barriers() and a barrier of the CTA must follow.
  __device__ void begin() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
  }

  // One thread.
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }

  // Arrives, and copies. Addresses and size are multiples of 16 bytes. One thread.
  __device__ void copy(void* shared, const void* global, uint32_t bytes) {
    const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(target),
        "l"(global), "r"(bytes), "r"(address())
        : "memory");
  }

  // Whether the phase with this parity has ended, where only it and the one before are possible.
  __device__ bool has_ended(uint32_t parity) const {
    uint32_t ended;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(address()), "r"(parity)
        : "memory");
    return ended != 0;
  }

 private:
  __device__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state_));
  }

  uint64_t state_;
};

// Makes barriers that this thread began known to copies.
__device__ inline void publish_barriers() { asm volatile("fence.proxy.async;" ::: "memory"); }

}  // namespace freeio::cuda
