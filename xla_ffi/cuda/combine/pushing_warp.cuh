// What a warp of a large combine does: it sums rows, pushes partial sums to the peers, and adds up
// theirs.
#pragma once

#include "cuda/combine/announcer.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/routes.cuh"
#include "cuda/device/row_ring.cuh"
#include "cuda/geometry.h"

namespace freeio::cuda {

constexpr int kTileBytes = 24 << 10;                 // for the routes of a tile, of all ranks
constexpr int kRingBytes = 192 << 10;                // for rows on their way
constexpr int kColumns = kCombineSlice / kWarpSize;  // accesses of one lane to a slice

template <typename Accumulator>
__host__ __device__ constexpr int tile_assignments() {
  return kTileBytes / static_cast<int>(2 * sizeof(int) + sizeof(Accumulator));
}

// Slot of `rank` among the ranks, other than the token's own, that have its rows.
__device__ inline int slot_of(int rank, uint32_t ranks, int own_rank) {
  return __popc(ranks & ~(1u << own_rank) & ((1u << rank) - 1));
}

// A tile's work, as one warp does it. An item is a sum of slices of some rows.
template <typename Element, int kCount>
struct PushingWarp {
  using Accumulator = typename Element::Accumulator;
  using R = Raw<Element, kCount>;
  using Sums = Accumulator[kColumns][kCount];

  // Whether one warp of the CTA fetches the rows for the others. Else each warp loads its own.
  static constexpr bool kFetches = kHasBulkCopies && sizeof(R) == kBulkUnit;

  // This lane's elements of a slice of a row: its accesses are kStep elements apart.
  struct Columns {
    static constexpr int kStep = kWarpSize * kCount;

    int begin = 0;  // in the row
    int left = 0;   // from there to the end of the slice
    int count = 0;  // accesses of the first lane

    __device__ Columns(const CombineParams& params, int unit) {
      const int slice = params.slices.remainder(unit) * params.slice_width;
      const int lane = lane_id() * kCount;
      const int width = min(params.slice_width, params.width - slice);
      begin = slice + lane;
      left = width - lane;
      count = (width + kStep - 1) / kStep;
    }
    __device__ bool has(int c) const { return c * kStep < left; }
  };

  const CombineParams& p;
  const Exchange& x;
  CtaState& s;
  const RouteTile<Accumulator>& routes;
  const Tile& tile;
  Announcer& announcer;
  const Chunk units;
  RowRing& ring;

  __device__ int slot_bytes() const { return p.slice_width * static_cast<int>(sizeof(Element)); }

  // Pushes partial sums to every peer, and sums the slices that come p.ahead slices before. A sum
  // waits only for pushes that come before it in the order of items, which is the same on the
  // peers. Warps take items in order. So a wait never delays the push for which it waits.
  __device__ void run() const {
    if constexpr (kFetches) {
      for (RowItem item = ring.take(); item.unit >= 0; item = ring.take()) serve(item);
    } else {
      for (int number = warp_id(); number < num_items(); number = next_item(s)) {
        RowItem item = find(number);
        item.mask = __ballot_sync(kFullWarp, item.unit >= 0 && has_row(item, lane_id()));
        if (item.unit >= 0 && (item.mask != 0 || is_sum(item))) serve(item);
      }
    }
  }

  // As the warp that fetches the rows for `warps` others.
  __device__ void fetch(RowFetcher& fetcher, int warps) const {
    fetcher.run(s, num_items(), lanes_of(x.top_k), warps, *this);
  }

  // The item of this number, without its rows. Its unit is -1 if there is none.
  __device__ RowItem find(int number) const {
    RowItem item;
    const int turn = x.ranks.remainder(number);
    const int unit = x.ranks.quotient(number) - (turn == x.num_ranks - 1 ? p.ahead : 0);
    if (unit < 0 || unit >= units.size()) return item;
    item.unit = units.begin + unit;
    item.rank = rank_of_turn(x, turn);
    item.first = routes.first_of(item.rank, p.slices.quotient(item.unit) - tile.begin);
    return item;
  }
  __device__ bool has_row(const RowItem& item, int k) const {
    return k < x.top_k && routes.ranks[item.first + k] == x.rank;
  }
  __device__ RowFetcher::Source source(const RowItem& item, int k) const {
    const int begin = p.slices.remainder(item.unit) * p.slice_width;
    const int width = min(p.slice_width, p.width - begin);
    return {row(routes.rows[item.first + k]) + begin,
            static_cast<uint32_t>(width * static_cast<int>(sizeof(Element)))};
  }
  // A sum is needed also if no row of it is here.
  __device__ bool has_lead(const RowItem& item) const { return item.mask == 0 && is_sum(item); }
  __device__ RowFetcher::Source lead(const RowItem&) const { return {}; }

 private:
  __device__ int num_items() const {
    return units.size() == 0 ? 0 : (units.size() + p.ahead) * x.num_ranks;
  }

  // Of this rank's own token. Else the item is a partial sum for a peer.
  __device__ bool is_sum(const RowItem& item) const { return item.rank == x.rank; }

  __device__ const Element* row(int number) const {
    return static_cast<const Element*>(p.expert_out) + int64_t{number} * p.width;
  }

  __device__ void serve(const RowItem& item) const {
    Sums sums;
    clear<0, kColumns>(sums);
    if constexpr (kFetches) {
      add_fetched_rows(item, sums);
    } else {
      add_loaded_rows(item, sums);
    }
    if (is_sum(item)) {
      sum(item, sums);
    } else {
      push(item, sums);
    }
  }

  // The weight of the token's assignment to this lane.
  __device__ Accumulator weight_of_lane(const RowItem& item) const {
    return lane_id() < x.top_k ? routes.weights[item.first + lane_id()] : Accumulator{0};
  }

  __device__ void add_fetched_rows(const RowItem& item, Sums& sums) const {
    const Accumulator weights = weight_of_lane(item);
    const int columns = Columns(p, item.unit).count;
    RowsInRing rows(ring, slot_bytes(), p.ring_slots, item);
    for (uint32_t rest = item.mask; rest != 0; rest &= rest - 1) {
      const Accumulator weight = __shfl_sync(kFullWarp, weights, __ffs(static_cast<int>(rest)) - 1);
      const auto* const from = reinterpret_cast<const Element*>(rows.wait()) + lane_id() * kCount;
      add_columns<0>(weight, from, columns, sums);
      add_columns<kColumns / 2>(weight, from, columns, sums);
      rows.release();
    }
    if (item.mask == 0) {
      rows.wait();
      rows.release();
    }
  }

  // Adds half of the columns of a slice in shared memory, from the kBegin-th on.
  template <int kBegin>
  __device__ static void add_columns(Accumulator weight, const Element* from, int columns,
                                     Sums& sums) {
    constexpr int kEnd = kBegin + kColumns / 2;
    const auto add_column = [&](int c) {
      add_weighted<Element, kCount>(weight, load_raw<Element, kCount>(from + c * Columns::kStep),
                                    sums[c]);
    };
    if (columns >= kEnd) {
#pragma unroll
      for (int c = kBegin; c < kEnd; ++c) add_column(c);
    } else {
#pragma unroll
      for (int c = kBegin; c < kEnd - 1; ++c) {
        if (c < columns) add_column(c);
      }
    }
  }

  __device__ void add_loaded_rows(const RowItem& item, Sums& sums) const {
    const Accumulator weights = weight_of_lane(item);
    const Columns columns(p, item.unit);
    for (uint32_t rest = item.mask; rest != 0; rest &= rest - 1) {
      const int k = __ffs(static_cast<int>(rest)) - 1;
      const Accumulator weight = __shfl_sync(kFullWarp, weights, k);
      const Element* const from = row(routes.rows[item.first + k]) + columns.begin;
      R values[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (columns.has(c)) values[c] = load_raw<Element, kCount>(from + c * Columns::kStep);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (columns.has(c)) add_weighted<Element, kCount>(weight, values[c], sums[c]);
      }
    }
  }

  template <int kBegin, int kEnd>
  __device__ static void clear(Sums& sums) {
#pragma unroll
    for (int c = kBegin; c < kEnd; ++c) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[c][j] = 0;
    }
  }

  // Some columns of a slice.
  template <int kBegin, int kEnd>
  __device__ void store_sums(Element* row, int unit, const Sums& sums) const {
    const Columns stored(p, unit);
    Element* const to = row + stored.begin;
#pragma unroll
    for (int c = kBegin; c < kEnd; ++c) {
      if (!stored.has(c)) continue;
      store_raw<Element, kCount>(to + c * Columns::kStep, round_to<Element, kCount>(sums[c]));
    }
  }

  // One bit for each rank that has a row of the token.
  __device__ uint32_t ranks_of(const RowItem& item) const {
    const int rank = lane_id() < x.top_k ? routes.ranks[item.first + lane_id()] : -1;
    return __reduce_or_sync(kFullWarp, rank >= 0 ? 1u << rank : 0u);
  }

  __device__ int64_t slot_index(int token, int slot) const {
    return static_cast<int64_t>(token) * p.num_slots + slot;
  }

  // This rank's partial sum of a peer's token, to the peer.
  __device__ void push(const RowItem& item, const Sums& sums) const {
    const int slot = slot_of(x.rank, ranks_of(item), item.rank);
    const int64_t row = slot_index(p.slices.quotient(item.unit), slot);
    store_sums<0, kColumns>(s.buffer<Element>(item.rank, kScratch) + row * p.width, item.unit,
                            sums);
    // Partner: the load in flag_is_set() on the peer.
    if (p.sends_routes) {
      announcer.announce(&inbox_to(x, item.rank).arrival_epochs[item.unit], s.epoch[item.rank]);
    } else {
      announcer.announce(s.buffer<uint32_t>(item.rank, kFlags) + slot_index(item.unit, slot), 1);
    }
  }

  // Whether `rank` has stored its partial sum of the unit in that slot.
  __device__ bool flag_is_set(int rank, int unit, int slot) const {
    // Partner: the announcement in push() on the peer.
    if (p.sends_routes) {
      return load_acquire_system(&inbox_from(x, rank).arrival_epochs[unit]) == s.epoch[rank];
    }
    return load_acquire_system(p.flags + slot_index(unit, slot)) != 0;
  }

  // Waits for the partial sums of one of this rank's tokens. Whole warp.
  __device__ void wait_for_partial_sums(uint32_t ranks, int unit) const {
    if (const int rank = lane_id(); rank != x.rank && (ranks >> rank & 1) != 0) {
      const int slot = slot_of(rank, ranks, x.rank);
      wait_until<true>(x, s, kWaitPartialSums, rank, [&] { return flag_is_set(rank, unit, slot); });
    }
    __syncwarp();
  }

  // Adds the partial sums in the slots of the peers in `ranks`, in order, to some columns of the
  // totals.
  template <int kBegin, int kEnd>
  __device__ void add_slots(uint32_t ranks, uint32_t all_ranks, int unit, Sums& totals) const {
    const Columns stored(p, unit);
    const Element* const slots = static_cast<const Element*>(p.partial_sums) +
                                 slot_index(p.slices.quotient(unit), 0) * p.width + stored.begin;
    constexpr int kBatch = 1;  // partial sums in flight together
    while (ranks != 0) {
      R partials[kBatch][kEnd - kBegin];
      const int count = __popc(ranks);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = i < count ? __ffs(static_cast<int>(ranks)) - 1 : 0;
        ranks &= ranks - 1;
        const Element* slot = slots + slot_of(rank, all_ranks, x.rank) * int64_t{p.width};
#pragma unroll
        for (int c = kBegin; c < kEnd; ++c) {
          if (i < count && stored.has(c)) {
            partials[i][c - kBegin] = load_raw<Element, kCount>(slot + c * Columns::kStep);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int c = kBegin; c < kEnd; ++c) {
          add<Element, kCount>(partials[i][c - kBegin], totals[c]);
        }
      }
    }
  }

  // All partial sums of some columns of one of this rank's tokens, in order of rank: the lower
  // ranks', its own, and the higher ranks'.
  template <int kBegin, int kEnd>
  __device__ void add_up(const RowItem& item, uint32_t ranks, Sums& sums) const {
    const uint32_t lower = (1u << x.rank) - 1;
    R own[kEnd - kBegin];
#pragma unroll
    for (int c = kBegin; c < kEnd; ++c) own[c - kBegin] = round_to<Element, kCount>(sums[c]);
    clear<kBegin, kEnd>(sums);
    add_slots<kBegin, kEnd>(ranks & lower, ranks, item.unit, sums);
#pragma unroll
    for (int c = kBegin; c < kEnd; ++c) add<Element, kCount>(own[c - kBegin], sums[c]);
    add_slots<kBegin, kEnd>(ranks & ~lower & ~(1u << x.rank), ranks, item.unit, sums);
    Element* const row =
        static_cast<Element*>(p.sums) + int64_t{p.slices.quotient(item.unit)} * p.width;
    store_sums<kBegin, kEnd>(row, item.unit, sums);
  }

  // Half of the columns after the other: registers are scarce.
  __device__ void sum(const RowItem& item, Sums& sums) const {
    const uint32_t ranks = ranks_of(item);
    wait_for_partial_sums(ranks, item.unit);
    add_up<0, kColumns / 2>(item, ranks, sums);
    if (Columns(p, item.unit).count > kColumns / 2) {
      add_up<kColumns / 2, kColumns>(item, ranks, sums);
    }
  }
};

}  // namespace freeio::cuda
