// A CTA: its threads, its place among the others, and what its threads share of the exchange.
#pragma once

#include "cuda/gpu_block.h"
#include "cuda/timeline.h"

namespace freeio::cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// CTAs that share some work, and this CTA's number among them.
struct Team {
  int number;
  int size;

  __device__ static Team all() {
    return {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
  }
};

// What the threads of one CTA share of its exchange.
struct CtaState {
  uint32_t epoch[kMaxRanks];                   // of this exchange, with each rank
  uint64_t address[kMaxRanks][kMaxAddresses];  // of each rank's buffers
  uint64_t first_region[kMaxRanks];  // base here of region kFirstRegion of each rank's process
  uint32_t has_failed;
  uint32_t device;     // this device's index in the mesh
  uint32_t next_item;  // of the CTA's work
  Team spoilers;       // CTAs that share out the results of a failed exchange
#ifdef FREEIO_STAMPS
  // Only the first thread accesses these.
  Timeline timeline;
  uint64_t phase_begin;
  Phase phase;
#endif

  template <typename T>
  __device__ T* buffer(int rank, int slot) const {
    return reinterpret_cast<T*>(address[rank][slot]);
  }
};

__device__ inline bool has_failed(const CtaState& s) {
  return *const_cast<const volatile uint32_t*>(&s.has_failed) != 0;
}

}  // namespace freeio::cuda
