// The groups of packed rows: where each begins and ends.
#pragma once

#include "core/layout.h"
#include "cuda/device/shares.cuh"

namespace freeio::cuda {

constexpr int kArraysOverExperts = 5;

// Arrays over the experts, in dynamic shared memory.
struct Routing {
  uint32_t* load;   // all ranks' assignments to the expert
  uint32_t* first;  // first row of the expert's assignments, or of this rank's in this segment
  uint32_t* start;  // first row of the group, of this rank's experts; at most capacity
  // Where routing is by counts:
  uint32_t* next;     // number of the next assignment to the expert
  uint32_t* earlier;  // [R, E/R]: those to this rank's experts before each rank's in this segment

  __device__ Routing(uint32_t* memory, int num_experts)
      : load(memory),
        first(load + num_experts),
        start(first + num_experts),
        next(start + num_experts),
        earlier(next + num_experts),
        num_experts_(num_experts) {}

  // Behind the arrays, at a multiple of 16 bytes from where they begin.
  __device__ void* end() const { return load + (kArraysOverExperts * num_experts_ + 3) / 4 * 4; }

 private:
  int num_experts_;
};

// Of the arrays, in shared memory.
inline size_t routing_bytes(int num_experts) {
  return sizeof(uint32_t) * round_up(kArraysOverExperts * int64_t{num_experts}, 4);
}

// Rows of this lane's groups and of those in the lanes before it, at most `capacity`.
__device__ inline uint32_t sum_up_to_lane(uint32_t rows, uint32_t capacity) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, rows, distance);
    if (lane_id() >= distance) rows = row_behind(before, rows, capacity);
  }
  return rows;
}

// Rows of a group with `load` assignments.
__device__ inline uint32_t rows_of_group(const Exchange& x, uint32_t load) {
  return aligned_rows<uint32_t>(
      load, x.alignment.divisor, static_cast<uint32_t>(x.capacity),
      [&](uint32_t n) { return x.alignment.quotient(static_cast<int>(n)); });
}

// What the caller learns of this rank's groups. One warp.
__device__ inline void store_group_sizes(const DispatchParams& p, const Routing& routing) {
  const Exchange& x = p.exchange;
  const int experts = x.num_experts / x.num_ranks;
  int dropped = 0;
#pragma unroll 1
  for (int group = lane_id(); group < experts; group += kWarpSize) {
    const uint32_t load = routing.load[x.rank * experts + group];
    const uint32_t start = routing.start[group];
    const uint32_t size =
        row_behind(start, rows_of_group(x, load), static_cast<uint32_t>(x.capacity)) - start;
    p.expert_load[group] = static_cast<int>(load);
    p.group_sizes[group] = static_cast<int>(size);
    dropped += load > size ? static_cast<int>(load - size) : 0;
  }
  dropped = __reduce_add_sync(kFullWarp, dropped);
  if (lane_id() == 0) *p.num_dropped = dropped;
}

// Finds the first rows of the groups. One warp does this for the experts of one rank, and each lane
// takes a few neighbouring experts. (More warps would need less time for the arithmetic. But they
// would make more accesses to shared memory, and each access waits for the other accesses of the
// multiprocessor.)
__device__ inline void place_groups(const DispatchParams& p, const Routing& routing) {
  constexpr int kPerLane = 4;
  const Exchange& x = p.exchange;
  const int experts = x.num_experts / x.num_ranks;
  const auto capacity = static_cast<uint32_t>(x.capacity);
  for (int rank = warp_id(); rank < x.num_ranks; rank += kWarps) {
    uint32_t begin = 0;
#pragma unroll 1
    for (int block = 0; block < experts; block += kPerLane * kWarpSize) {
      const int first = block + lane_id() * kPerLane;
      const int first_expert = rank * experts + first;
      uint32_t rows[kPerLane];
      uint32_t sum = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        rows[i] = first + i < experts ? rows_of_group(x, routing.load[first_expert + i]) : 0;
        sum = row_behind(sum, rows[i], capacity);
      }
      const uint32_t end = row_behind(begin, sum_up_to_lane(sum, capacity), capacity);
      uint32_t row = __shfl_up_sync(kFullWarp, end, 1);
      if (lane_id() == 0) row = begin;
      begin = __shfl_sync(kFullWarp, end, kWarpSize - 1);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (first + i < experts) {
          routing.first[first_expert + i] += row;
          if (rank == x.rank) routing.start[first + i] = row;
        }
        row = row_behind(row, rows[i], capacity);
      }
    }
  }
  __syncthreads();
  if (blockIdx.x == 0 && warp_id() == kWarps - 1) store_group_sizes(p, routing);
}

}  // namespace freeio::cuda
