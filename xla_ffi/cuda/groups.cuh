// The groups of packed rows: where each begins and ends.
#pragma once

#include "cuda/session.cuh"

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

// First rows of the groups. Each lane takes an expert, each warp a block of them, all of one rank.
// Row numbers stop at capacity, past which nothing is stored, so they fit whatever the alignment
// adds. All threads.
__device__ inline void place_groups(const DispatchParams& p, const Routing& routing) {
  const Exchange& x = p.exchange;
  const int experts = quotient(x.num_experts, x.ranks);
  const int blocks_per_rank = (experts + kWarpSize - 1) / kWarpSize;
  const int blocks = blocks_per_rank * x.num_ranks;
  const auto capacity = static_cast<uint32_t>(x.capacity);
  const auto alignment = static_cast<uint32_t>(x.alignment);
  const auto padded = [&](uint32_t load) {
    return min((load + alignment - 1) / alignment * alignment, capacity);
  };
  const auto add = [&](uint32_t a, uint32_t b) { return min(a + b, capacity); };
  // The counts of this rank alone have been added up to the loads, and are needed no more.
  uint32_t* const before_in_block = routing.before;
  uint32_t* const rows_of_block = routing.count;
  __shared__ int dropped;
  if (threadIdx.x == 0) dropped = 0;
#pragma unroll 1
  for (int block = warp_id(); block < blocks; block += kWarps) {
    const int rank = block / blocks_per_rank;
    const int group = block % blocks_per_rank * kWarpSize + lane_id();
    const uint32_t rows = group < experts ? padded(routing.load[rank * experts + group]) : 0;
    uint32_t sum = rows;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane_id() >= distance) sum = add(sum, other);
    }
    const uint32_t before = __shfl_up_sync(kFullWarp, sum, 1);
    if (group < experts) {
      before_in_block[rank * experts + group] = lane_id() == 0 ? 0 : before;
    }
    if (lane_id() == kWarpSize - 1) rows_of_block[block] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int block = warp_id(); block < blocks; block += kWarps) {
    const int rank = block / blocks_per_rank;
    const int group = block % blocks_per_rank * kWarpSize + lane_id();
    uint32_t start = 0;
#pragma unroll 1
    for (int other = rank * blocks_per_rank; other < block; ++other) {
      start = add(start, rows_of_block[other]);
    }
    if (group >= experts) continue;
    const int expert = rank * experts + group;
    start = add(start, before_in_block[expert]);
    routing.next[expert] += start;
    if (rank != x.rank) continue;
    routing.start[group] = start;
    if (blockIdx.x != 0) continue;
    const uint32_t load = routing.load[expert];
    const uint32_t size = add(start, padded(load)) - start;
    p.expert_load[group] = static_cast<int>(load);
    p.group_sizes[group] = static_cast<int>(size);
    if (load > size) atomicAdd(&dropped, static_cast<int>(load - size));
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.num_dropped = dropped;
}

}  // namespace freeio::cuda
