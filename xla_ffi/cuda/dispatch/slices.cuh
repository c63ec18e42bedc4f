// Slices of token rows, the packed rows to which they go, and the packed rows that are padding.
#pragma once

#include "cuda/device/end.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/dispatch/groups.cuh"

namespace freeio::cuda {

constexpr int kTileAssignments = kMaxCounts;  // of all ranks, whose rows are in shared memory
static_assert(kMaxRanks * kMaxTopK <= kTileAssignments, "those of one token fit");

// The addresses of the leaves' tokens: a bit for each.
__device__ inline uint32_t leaf_addresses(const DispatchParams& p) {
  return ((1u << p.num_leaves) - 1) << kFirstLeaf;
}

// A slice of a row, of a token of some rank. The slices of a rank's tokens are its units.
struct Slice {
  int rank;
  int token;
  int leaf = 0;
  int bytes;
  int64_t offset;  // in the row
  bool is_first;   // of the row

  __device__ Slice(const DispatchParams& p, int tokens_rank, int unit)
      : rank(tokens_rank), token(p.slices.quotient(unit)) {
    int slice = unit - token * p.num_slices;
    is_first = slice == 0;
    while (slice >= p.leaves[leaf].num_slices) slice -= p.leaves[leaf++].num_slices;
    const SlicedLeaf& it = p.leaves[leaf];
    offset = static_cast<int64_t>(slice) * it.slice_bytes;
    bytes = static_cast<int>(min(static_cast<int64_t>(it.slice_bytes), it.row_bytes - offset));
  }

  // Where it is in these tokens.
  __device__ const std::byte* in(const std::byte* tokens, const DispatchParams& p) const {
    return tokens + token * p.leaves[leaf].row_bytes + offset;
  }
};

// Where a slice goes: rows here of its token's assignments, in the lanes.
struct Targets {
  int row;
  uint32_t mask;  // of the lanes that have a row

  // `rows`: of the tile's assignments, [R, tokens, K]; -1: none.
  __device__ Targets(const DispatchParams& p, const Tile& tile, const int* rows,
                     const Slice& slice) {
    const Exchange& x = p.exchange;
    const int first = (slice.rank * tile.size() + slice.token - tile.begin) * x.top_k;
    row = lane_id() < x.top_k ? rows[first + lane_id()] : -1;
    mask = __ballot_sync(kFullWarp, row >= 0);
  }

  // Stores in the handle whose assignment each row is. The first slice does so for its whole row.
  __device__ void write_sources(const DispatchParams& p, const Slice& slice) const {
    const Exchange& x = p.exchange;
    if (!slice.is_first || row < 0) return;
    p.row_source[row] = (slice.rank * x.num_tokens + slice.token) * x.top_k + lane_id();
  }
};

// Pulls a unit of `rank` into this rank's rows. Whole warp. `kRouted`: the call writes the handle;
// else it reads one.
template <bool kRouted>
__device__ void pull_slice(const DispatchParams& p, const CtaState& s, const Tile& tile,
                           const int* rows, int rank, int unit) {
  const Slice slice(p, rank, unit);
  const Targets targets(p, tile, rows, slice);
  if (kRouted) targets.write_sources(p, slice);
  if (targets.mask == 0) return;
  const SlicedLeaf& leaf = p.leaves[slice.leaf];
  const std::byte* const tokens =
      rank == p.exchange.rank ? leaf.tokens : s.buffer<std::byte>(rank, kFirstLeaf + slice.leaf);
  with_access(leaf.access_bytes, [&](auto access) {
    Values<decltype(access)> values;
    values.load(slice.in(tokens, p), slice.bytes);
    values.store(leaf.rows + slice.offset, leaf.row_bytes, slice.bytes, targets.row, targets.mask);
  });
}

// Zeros rows of all leaves: those of the lanes in `mask`, from `first_row` on. Whole warp.
__device__ inline void zero_rows(const DispatchParams& p, int64_t first_row, uint32_t mask) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int64_t row = first_row + __ffs(static_cast<int>(rest)) - 1;
    for (int i = 0; i < p.num_leaves; ++i) {
      const SlicedLeaf& leaf = p.leaves[i];
      with_access(leaf.access_bytes, [&](auto access) {
        zero_bytes<decltype(access)>(leaf.rows + row * leaf.row_bytes, leaf.row_bytes);
      });
    }
  }
}

// A packed row's group, and its number there.
struct PlaceInGroup {
  uint32_t load;  // assignments to the group
  uint32_t number;

  __device__ bool is_padding() const { return number >= load; }
};

// Found from the groups' starts. A row past the last group counts as one of that group.
__device__ inline PlaceInGroup place_of_row(const DispatchParams& p, const Routing& routing,
                                            int64_t row) {
  const Exchange& x = p.exchange;
  const int first = x.rank * (x.num_experts / x.num_ranks);
  // The last group that starts at or before the row; groups without rows share their start.
  int low = 0;
  for (int high = x.num_experts / x.num_ranks; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (routing.start[middle] <= static_cast<uint32_t>(row)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {routing.load[first + low], static_cast<uint32_t>(row) - routing.start[low]};
}

// Zeros those rows of a block that belong to no assignment, the tail only if it is asked for. Says
// of all of them in the handle that they have none. Whole warp.
__device__ inline void zero_padding(const DispatchParams& p, const Routing& routing,
                                    int64_t first_row) {
  const Exchange& x = p.exchange;
  const int64_t row = first_row + lane_id();
  bool zeroes = false;
  if (lane_id() < p.padding.rows && row < x.capacity) {
    const PlaceInGroup place = place_of_row(p, routing, row);
    if (place.is_padding()) {
      p.row_source[row] = -1;
      zeroes = x.zero_tail || place.number < rows_of_group(x, place.load);
    }
  }
  zero_rows(p, first_row, __ballot_sync(kFullWarp, zeroes));
}

// The packed rows of a failed exchange.
__device__ inline void spoil_rows(const DispatchParams& p, const Team& spoilers) {
  for (int i = 0; i < p.num_leaves; ++i) {
    spoil(spoilers, p.leaves[i].rows, p.leaves[i].row_bytes * p.exchange.capacity);
  }
}

// All results of a failed exchange, the handle's included.
__device__ inline void spoil_results(const DispatchParams& p, const Team& spoilers) {
  const Exchange& x = p.exchange;
  spoil_rows(p, spoilers);
  const int64_t assignments = static_cast<int64_t>(x.num_tokens) * x.top_k;
  const int64_t int_bytes = sizeof(int32_t);
  const int experts = x.num_experts / x.num_ranks;
  spoil(spoilers, p.dest_rank, assignments * int_bytes);
  spoil(spoilers, p.dest_row, assignments * int_bytes);
  spoil(spoilers, p.row_source, x.capacity * int_bytes);
  spoil(spoilers, p.expert_load, experts * int_bytes);
  spoil(spoilers, p.num_dropped, int_bytes);
  spoil(spoilers, p.num_invalid, int_bytes);
  // A matrix product can take groups without rows, but not sizes of -1.
  if (spoilers.number != 0) return;
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) p.group_sizes[e] = 0;
}

// The work of a tile whose rows are pulled.
__device__ inline Work pulling_of(const DispatchParams& p, const Units& units, const Tile& tile) {
  return Work(tile, units.of(tile).size() * p.exchange.num_ranks, p.padding);
}

// Pulls the rows of a tile, and zeros its share of the padding with zero(first_row). All threads.
template <bool kRouted, typename Zero>
__device__ void pull_tile(const DispatchParams& p, CtaState& s, const Units& units,
                          const Tile& tile, const Work& work, const int* rows, const Zero& zero) {
  const Exchange& x = p.exchange;
  const int first_unit = units.of(tile).begin;
  const auto pull_one = [&](int pull) {
    const int unit = first_unit + x.ranks.quotient(pull);
    pull_slice<kRouted>(p, s, tile, rows, source_rank(x, pull), unit);
  };
  run_work(work, s, pull_one, zero);
}

}  // namespace freeio::cuda
