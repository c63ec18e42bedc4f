// The groups of packed rows: where each begins and ends.
#pragma once

#include "cuda/shares.cuh"

namespace freeio::cuda {

constexpr int kArraysOverExperts = 5;

// Arrays over the experts, in dynamic shared memory.
struct Routing {
  uint32_t* before;  // this rank's assignments to the expert in earlier chunks
  uint32_t* count;   // ... from this chunk on
  uint32_t* load;    // all ranks' assignments to the expert
  uint32_t* next;    // first row of the chunk's assignments to the expert
  uint32_t* start;   // first row of the group, of this rank's experts; at most capacity

  __device__ Routing(uint32_t* memory, int num_experts)
      : before(memory),
        count(before + num_experts),
        load(count + num_experts),
        next(load + num_experts),
        start(next + num_experts),
        num_experts_(num_experts) {}

  // Behind the arrays, at a multiple of 16 bytes from where they begin.
  __device__ void* end() const { return before + (kArraysOverExperts * num_experts_ + 3) / 4 * 4; }

 private:
  int num_experts_;
};

__device__ inline int64_t sum_of_lanes_before(int64_t value) {
  int64_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane_id() >= distance) sum += other;
  }
  return sum - value;
}

// First rows of the groups: one warp for each rank's experts, of which each lane has some in a row.
// (All warps together, over blocks of experts, need less time by themselves, but make more accesses
// to shared memory, each of which waits behind what else the multiprocessor has on its way.) Row
// numbers stop at capacity, past which nothing is stored, so they fit whatever the alignment adds.
__device__ inline void place_groups(const DispatchParams& p, const Routing& routing) {
  const Exchange& x = p.exchange;
  const int experts = x.num_experts / x.num_ranks;
  const int per_lane = (experts + kWarpSize - 1) / kWarpSize;
  const int first = min(lane_id() * per_lane, experts);
  const int end = min(first + per_lane, experts);
  const auto alignment = static_cast<uint32_t>(x.alignment);
  const auto padded = [&](uint32_t load) {
    return static_cast<int64_t>((load + alignment - 1) / alignment) * alignment;
  };
  for (int rank = warp_id(); rank < x.num_ranks; rank += kWarps) {
    const int first_expert = rank * experts;
    int64_t rows = 0;
#pragma unroll 1
    for (int group = first; group < end; ++group)
      rows += padded(routing.load[first_expert + group]);
    int64_t start = sum_of_lanes_before(rows);
    int dropped = 0;
#pragma unroll 1
    for (int group = first; group < end; ++group) {
      const uint32_t load = routing.load[first_expert + group];
      const int64_t capacity = x.capacity;
      const auto first_row = static_cast<uint32_t>(min(start, capacity));
      start += padded(load);
      routing.next[first_expert + group] += first_row;
      if (rank != x.rank) continue;
      routing.start[group] = first_row;
      if (blockIdx.x != 0) continue;
      const int size = static_cast<int>(min(start, capacity) - first_row);
      p.expert_load[group] = static_cast<int>(load);
      p.group_sizes[group] = size;
      dropped += max(static_cast<int>(load) - size, 0);
    }
    if (rank == x.rank && blockIdx.x == 0) {
      dropped = __reduce_add_sync(kFullWarp, dropped);
      if (lane_id() == 0) *p.num_dropped = dropped;
    }
  }
  __syncthreads();
}

}  // namespace freeio::cuda
