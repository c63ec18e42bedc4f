// The network between hosts, as kernels use it: NVSHMEM. The emulator has a twin of this header.
//
// An address in symmetric memory is that of the caller's own. It stands for the same place on the
// PE. Nothing here waits for another host.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device/cta.cuh"
#include "cuda/device/memory_order.cuh"

namespace freeio::cuda {

// What a signal says. All are 64 bits in symmetric memory.
enum class Signal { kHeader, kParcel, kAnswer, kCredit, kGaveUp };

// Where this GPU sees a PE's symmetric memory; null: only the network reaches it.
__device__ inline void* address_on(const void* symmetric, int pe) {
  const uint64_t base = __ldg(
      reinterpret_cast<const unsigned long long*>(nvshmemi_device_state_d.peer_heap_base_p2p) + pe);
  if (base == 0) return nullptr;
  const auto begin = reinterpret_cast<uint64_t>(nvshmemi_device_state_d.heap_base);
  return reinterpret_cast<void*>(base + (reinterpret_cast<uint64_t>(symmetric) - begin));
}

// Copies with many accesses of each lane in flight. Whole warp.
template <typename Access>
__device__ void copy_by_warp(void* to, const void* from, size_t bytes) {
  constexpr int kInFlight = 8;
  auto* const target = static_cast<Access*>(to);
  const auto* const source = static_cast<const Access*>(from);
  const auto count = static_cast<int64_t>(bytes / sizeof(Access));
#pragma unroll 1
  for (int64_t begin = lane_id(); begin < count; begin += kInFlight * kWarpSize) {
    Access values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (begin + u * kWarpSize < count) values[u] = source[begin + u * kWarpSize];
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (begin + u * kWarpSize < count) target[begin + u * kWarpSize] = values[u];
    }
  }
}

// Copies to an address that this GPU can write. Whole warp.
[[gnu::noinline]] __device__ inline void store_by_warp(void* to, const void* from, size_t bytes) {
  const uint64_t all = reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | bytes;
  if (all % 16 == 0) return copy_by_warp<uint4>(to, from, bytes);
  if (all % 4 == 0) return copy_by_warp<uint32_t>(to, from, bytes);
  copy_by_warp<uint8_t>(to, from, bytes);
}

__device__ inline void put_by_warp(void* symmetric, const void* from, size_t bytes, int pe) {
  void* const to = address_on(symmetric, pe);
  if (to == nullptr) return nvshmemx_putmem_nbi_warp(symmetric, from, bytes, pe);
  // NVSHMEM's own copy has one access of a lane in flight.
  store_by_warp(to, from, bytes);
}

// Something to put: `bytes` of it, a multiple of four, from and to addresses that are, too.
struct Words {
  void* symmetric;
  const void* from;
  int64_t bytes;
};

struct Wire {
  // Where this GPU itself can write a PE's symmetric memory; null: put() must. What it stores there
  // comes before the signals after its next fence.
  template <typename T>
  __device__ static T* direct(T* symmetric, int pe) {
    return static_cast<T*>(address_on(symmetric, pe));
  }

  // Copies to an address that direct() has given. Whole warp.
  __device__ static void store(void* to, const void* from, size_t bytes) {
    store_by_warp(to, from, bytes);
  }

  // The network may read what other threads of this GPU had written before a barrier with this one.
  // Where links reach all PEs it reads nothing, and fence() orders the stores of all threads.
  __device__ static void fence_for_network() {
    if (nvshmemi_device_state_d.job_connectivity > NVSHMEMI_JOB_GPU_LDST) fence_system();
  }

  // Writes `bytes` to symmetric memory of a PE. `from` must stay as it is until the PE has
  // answered. Whole warp.
  __device__ static void put(void* symmetric, const void* from, size_t bytes, int pe) {
    __syncwarp();  // lanes may read what others have written
    put_by_warp(symmetric, from, bytes, pe);
    __syncwarp();
  }

  // The same for several arrays of words, all of which are loaded before any is stored. Whole warp.
  template <int kCount>
  __device__ static void put_all(const Words (&all)[kCount], int pe) {
    constexpr int kInFlight = 4;
    __syncwarp();
    if (direct(all[0].symmetric, pe) == nullptr) {
      for (const Words& it : all) {
        if (it.bytes > 0) nvshmemx_putmem_nbi_warp(it.symmetric, it.from, it.bytes, pe);
      }
    } else {
      int64_t count = 0;
      for (const Words& it : all) count += it.bytes / int64_t{sizeof(uint32_t)};
      for (int64_t begin = lane_id(); begin < count; begin += kInFlight * kWarpSize) {
        uint32_t* to[kInFlight];
        uint32_t values[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          to[u] = nullptr;
          int64_t word = begin + u * kWarpSize;
#pragma unroll
          for (const Words& it : all) {
            const int64_t words = it.bytes / int64_t{sizeof(uint32_t)};
            if (word >= 0 && word < words) {
              to[u] = static_cast<uint32_t*>(it.symmetric) + word;
              values[u] = static_cast<const uint32_t*>(it.from)[word];
            }
            word -= words;
          }
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          if (to[u] != nullptr) *direct(to[u], pe) = values[u];
        }
      }
    }
    __syncwarp();
  }

  // What this warp has put comes before what it puts and signals from here on. The puts may read
  // what this GPU wrote before. One lane, after a __syncwarp(). What other threads have stored by
  // links before a barrier with this warp comes before, too, if all lanes have called
  // fence_for_network() since.
  __device__ static void fence() {
    // NVSHMEM's own fence, too, where something has gone by the network.
    if (nvshmemi_device_state_d.job_connectivity > NVSHMEMI_JOB_GPU_LDST) return nvshmem_fence();
    fence_system();
  }

  // Sets a word of symmetric memory of a PE. Partner: has(). One thread.
  __device__ static void signal(Signal, uint64_t* symmetric, uint64_t value, int pe) {
    if (uint64_t* const to = direct(symmetric, pe); to != nullptr) return store_word(to, value);
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
      return nvshmem_uint64_test(const_cast<uint64_t*>(word), NVSHMEM_CMP_EQ, value) != 0;
    }
    return true;
  }
};

}  // namespace freeio::cuda
