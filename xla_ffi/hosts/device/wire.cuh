// The network between hosts, as kernels use it: NVSHMEM. The emulator has a twin of this header.
//
// An address in symmetric memory is that of the caller's own. It stands for the same place on the
// PE. Nothing here waits for another host.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstddef>
#include <cstdint>

namespace freeio::cuda {

// What a signal says. All are 64 bits in symmetric memory.
enum class Signal { kHeader, kParcel, kAnswer, kCredit, kGaveUp };

struct Wire {
  // Writes `bytes` to symmetric memory of a PE. `from` must stay as it is until the PE has
  // answered. Whole warp.
  __device__ static void put(void* symmetric, const void* from, size_t bytes, int pe) {
    nvshmemx_putmem_nbi_warp(symmetric, from, bytes, pe);
  }

  // What this warp has put comes before what it puts and signals from here on. The puts may read
  // what this GPU wrote before. One lane, after a __syncwarp().
  __device__ static void fence() { nvshmem_fence(); }

  // Sets a word of symmetric memory of a PE. Partner: has(). One thread.
  __device__ static void signal(Signal, uint64_t* symmetric, uint64_t value, int pe) {
    nvshmemx_signal_op(symmetric, value, NVSHMEM_SIGNAL_SET, pe);
  }

  // Whether a signal of this value has come here. Then this GPU sees what the sender put before its
  // fence. (Other GPUs of the host see it after a release of system scope by this one.)
  __device__ static bool has(Signal, const uint64_t* word, uint64_t value) {
    uint64_t found;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
    if (found != value) return false;
    // On some machines a network card's writes may pass each other on their way to the memory. What
    // NVSHMEM's own waits do about it is right here, too.
    if (nvshmemi_device_state_d.job_connectivity > NVSHMEMI_JOB_GPU_PROXY) {
      nvshmemi_transfer_syncapi_update_mem();
    }
    return true;
  }
};

}  // namespace freeio::cuda
