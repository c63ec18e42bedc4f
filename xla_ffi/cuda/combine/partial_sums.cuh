// Where the partial sums of a large combine lie, and the flags that tell of their arrival.
#pragma once

#include "cuda/combine/announcer.cuh"
#include "cuda/device/rank_set.cuh"
#include "cuda/device/waits.cuh"
#include "cuda/params.h"

namespace freeio::cuda {

// Slot of `rank` among the ranks, other than the token's own, that have its rows.
__device__ inline int slot_of(int rank, RankSet ranks, int own_rank) {
  return count_ranks(ranks & ~set_of(own_rank) & below(rank));
}

// The slots of this rank's tokens on it, and of the peers' tokens on them. A base of warps.
struct PartialSums {
  const CombineParams& p;
  const Exchange& x;
  CtaState& s;
  Announcer& announcer;

  // Of a token, or of a unit.
  __device__ int64_t slot_index(int token, int slot) const {
    return static_cast<int64_t>(token) * p.num_slots + slot;
  }

  // Tells `rank` that this rank's partial sum of the unit is in that slot. Whole warp, after it has
  // stored the sum. Partner: the load in flag_is_set() on the peer.
  __device__ void announce(int rank, int unit, int slot) const {
    if (p.sends_routes) {
      announcer.announce(&inbox_to(x, rank).arrival_epochs[unit], s.epoch[rank]);
    } else {
      announcer.announce(s.buffer<uint32_t>(rank, kFlags) + slot_index(unit, slot), 1);
    }
  }

  // Whether `rank` has stored its partial sum of the unit in that slot. Partner: announce() on the
  // peer.
  __device__ bool flag_is_set(int rank, int unit, int slot) const {
    if (p.sends_routes) {
      return load_acquire_system(&inbox_from(x, rank).arrival_epochs[unit]) == s.epoch[rank];
    }
    return load_acquire_system(p.flags + slot_index(unit, slot)) != 0;
  }

  // Waits for the partial sums of one of this rank's tokens. Whole warp.
  __device__ void wait_for_partial_sums(RankSet ranks, int unit) const {
#pragma unroll
    for (int i = 0; i < kRanksPerLane; ++i) {
      const int rank = lane_id() + i * kWarpSize;
      if (rank == x.rank || !contains(ranks, rank)) continue;
      const int slot = slot_of(rank, ranks, x.rank);
      wait_until<true>(x, s, kWaitPartialSums, rank, [&] { return flag_is_set(rank, unit, slot); });
    }
    __syncwarp();
  }
};

}  // namespace freeio::cuda
