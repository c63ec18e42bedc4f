// Sets of ranks: a bit for each. One word, but for builds that take more than 32 ranks.
#pragma once

#include <type_traits>

#include "cuda/device/cta.cuh"

namespace freeio::cuda {

using RankSet = std::conditional_t<(kMaxRanks > 32), uint64_t, uint32_t>;

__device__ inline RankSet set_of(int rank) { return RankSet{1} << rank; }
__device__ inline bool contains(RankSet set, int rank) { return (set >> rank & 1) != 0; }
__device__ inline RankSet below(int rank) { return set_of(rank) - 1; }

__device__ inline int first_rank(uint32_t set) { return __ffs(static_cast<int>(set)) - 1; }
__device__ inline int first_rank(uint64_t set) { return __ffsll(static_cast<long long>(set)) - 1; }
__device__ inline int count_ranks(uint32_t set) { return __popc(set); }
__device__ inline int count_ranks(uint64_t set) { return __popcll(set); }

// The union of the lanes' sets. Whole warp.
__device__ inline uint32_t union_of_lanes(uint32_t set) { return __reduce_or_sync(kFullWarp, set); }
__device__ inline uint64_t union_of_lanes(uint64_t set) {
  const uint64_t high = union_of_lanes(static_cast<uint32_t>(set >> 32));
  return high << 32 | union_of_lanes(static_cast<uint32_t>(set));
}

// A warp that takes all ranks takes kWarpSize of them at a time: each lane takes this many.
constexpr int kRanksPerLane = (kMaxRanks + kWarpSize - 1) / kWarpSize;

}  // namespace freeio::cuda
