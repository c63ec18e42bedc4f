// What a warp of a large combine does: it sums rows, pushes partial sums to the peers, and adds up
// theirs.
#pragma once

#include "cuda/combine/announcer.cuh"
#include "cuda/combine/partial_sums.cuh"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/rank_set.cuh"
#include "cuda/device/routes.cuh"
#include "cuda/geometry.h"

namespace freeio::cuda {

// A tile's work, as one warp does it. Each item is a sum of slices of some rows. Meanwhile the next
// rows are on their way to shared memory. So no register waits for a row, and the memory is busy
// also while warps wait for the link.
template <typename Element, int kCount>
struct PushingWarp : PartialSums {
  using ElementType = Element;
  using Accumulator = typename Element::Accumulator;
  using R = Raw<Element, kCount>;

  static constexpr bool kIsOnThisGpu = true;
  static constexpr int kTileBytes = 24 << 10;  // for the routes of a tile, of all ranks
  static constexpr int kColumns = kCombineSlice / kWarpSize;  // accesses of one lane to a slice
  static constexpr int kStages = 2;                           // slices of rows on the way
  static constexpr int kRingBytes = kWarps * kStages * kColumns * kWarpSize * 16;

  using Sums = Accumulator[kColumns][kCount];

  // Slices of rows that each warp has on the way.
  struct Ring {
    void* memory;

    __device__ Ring(const Exchange&, void* ring_memory) : memory(ring_memory) {}
  };
  // The routes of a tile stay as they came.
  __device__ static void arrange(const Exchange&, RouteTile<Accumulator>&) {}

  // One row of an item's sum, in two words, as registers are scarce.
  struct Task {
    // Bits: from the lowest one, the first assignment, the rank, the row, and two marks.
    static constexpr int kFirstBits = 16, kRowBits = 5;
    static constexpr int kRankBits = kMaxRanks <= 16 ? 4 : kMaxRanks <= 32 ? 5 : 6;
    static constexpr int kRank = kFirstBits, kRow = kRank + kRankBits, kMarks = kRow + kRowBits;
    static constexpr uint32_t kHasRow = 1u << kMarks, kLast = 2u << kMarks;
    static_assert(tile_assignments<Accumulator>(kTileBytes) <= 1 << kFirstBits &&
                  kMaxRanks <= 1 << kRankBits && kMaxTopK <= 1 << kRowBits);

    int unit = -1;  // -1: there is no further one
    uint32_t bits = 0;

    __device__ Task() = default;
    __device__ Task(int its_unit, int first, int rank)
        : unit(its_unit), bits(static_cast<uint32_t>(first | rank << kRank)) {}
    // Of the token's assignments in the tile.
    __device__ int first() const { return static_cast<int>(bits & ((1u << kFirstBits) - 1)); }
    // Whose token it is.
    __device__ int rank() const {
      return static_cast<int>(bits >> kRank & ((1u << kRankBits) - 1));
    }
    // Of the row, in the tile.
    __device__ int assignment() const {
      return first() + static_cast<int>(bits >> kRow & ((1u << kRowBits) - 1));
    }
    __device__ void take_row(int k) { bits |= static_cast<uint32_t>(k) << kRow | kHasRow; }
    // False: the token has no row here.
    __device__ bool has_row() const { return (bits & kHasRow) != 0; }
    // Of the item.
    __device__ bool is_last() const { return (bits & kLast) != 0; }
  };

  // This lane's elements of a slice of a row: its accesses are kStep elements apart.
  struct Columns {
    static constexpr int kStep = kWarpSize * kCount;

    int begin = 0;  // in the row
    int left = 0;   // from there to the end of the slice

    __device__ Columns() = default;
    __device__ Columns(const CombineParams& params, int unit) {
      const int slice = params.slices.remainder(unit) * params.slice_width;
      const int lane = lane_id() * kCount;
      begin = slice + lane;
      left = min(params.slice_width, params.width - slice) - lane;
    }
    __device__ bool has(int c) const { return c * kStep < left; }
  };

  const RouteTile<Accumulator>& routes;
  const Tile& tile;
  const Chunk units;
  const int items;
  R* const ring;  // this lane's of [kStages, kColumns, kWarpSize]

  int next_one;           // item to look at
  Task fetched;           // whose rows are being fetched
  Columns columns;        // this lane's of its slice
  uint32_t mask = 0;      // of its rows that are yet to be fetched
  bool has_task = false;  // its last task has not been fetched
  int stage = 0;          // of the next row to sum, and then of the next one to fetch
  Task tasks;             // of the stages, by lane

  __device__ PushingWarp(const CombineParams& params, CtaState& state,
                         const RouteTile<Accumulator>& tile_routes, const Tile& whole,
                         Announcer& of_cta, const Chunk& tile_units, Ring& its_ring)
      : PartialSums{params, params.exchange, state, of_cta},
        routes(tile_routes),
        tile(whole),
        units(tile_units),
        items(units.size() == 0 ? 0 : (units.size() + p.ahead) * x.num_ranks),
        ring(static_cast<R*>(its_ring.memory) + warp_id() * kStages * kColumns * kWarpSize +
             lane_id()),
        next_one(warp_id()) {}

  // Pushes partial sums to every peer, and sums the slices that come p.ahead slices before. A sum
  // waits only for pushes that come before it in the order of items, which is the same on the
  // peers. Every warp takes its items in order. So a wait never delays the push for which it waits.
  __device__ void run() {
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) fetch();
    Sums sums;
    clear(sums);
    while (true) {
      const Task task = task_of(stage);
      if (task.unit < 0) break;
      wait_for_copies<kStages - 1>();
      if (task.has_row()) add_row(routes.weights[task.assignment()], sums);
      fetch();
      if (!task.is_last()) continue;
      if (task.rank() == x.rank) {
        sum(task, sums);
      } else {
        push(task, sums);
      }
      clear(sums);
    }
  }

 private:
  // Starts to copy the next row to the stage, whose row has been summed. Goes to the next stage.
  __device__ void fetch() {
    if (!has_task) take_item();
    Task task = fetched;
    if (has_task) {
      if (mask != 0) {
        task.take_row(__ffs(static_cast<int>(mask)) - 1);
        copy_row(routes.rows[task.assignment()]);
        mask &= mask - 1;
      }
      has_task = mask != 0;
      if (!has_task) task.bits |= Task::kLast;
    }
    // A group is needed also if no copy was started, because wait_for_copies() counts groups.
    commit_copies();
    if (lane_id() == stage) tasks = task;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  __device__ Task task_of(int lane) const {
    Task task;
    task.unit = __shfl_sync(kFullWarp, tasks.unit, lane);
    task.bits = __shfl_sync(kFullWarp, tasks.bits, lane);
    return task;
  }

  // The next item with something to do.
  __device__ void take_item() {
    fetched.unit = -1;
    while (next_one < items) {
      const int item = next_one;
      next_one = next_item(s);
      const int turn = x.ranks.remainder(item);
      const bool pushes = turn != x.num_ranks - 1;
      const int unit = x.ranks.quotient(item) - (pushes ? 0 : p.ahead);
      if (unit < 0 || unit >= units.size()) continue;
      const int token = p.slices.quotient(units.begin + unit);
      const int rank = rank_of_turn(x, turn);
      const int first = routes.first_of(rank, token - tile.begin);
      mask = __ballot_sync(kFullWarp,
                           lane_id() < x.top_k && routes.ranks[first + lane_id()] == x.rank);
      if (pushes && mask == 0) continue;
      fetched = Task(units.begin + unit, first, rank);
      columns = Columns(p, fetched.unit);
      has_task = true;
      return;
    }
  }

  __device__ void copy_row(int row) {
    const Element* const from =
        static_cast<const Element*>(p.expert_out) + int64_t{row} * p.width + columns.begin;
    R* const to = ring + stage * kColumns * kWarpSize;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (!columns.has(c)) continue;
      if constexpr (sizeof(R) >= 4) {
        copy_async<sizeof(R)>(to + c * kWarpSize, from + c * Columns::kStep);
      } else {
        to[c * kWarpSize] = load_raw<Element, kCount>(from + c * Columns::kStep);
      }
    }
  }

  // Adds the row of the stage.
  __device__ void add_row(Accumulator weight, Sums& sums) const {
    const R* const from = ring + stage * kColumns * kWarpSize;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      add_weighted<Element, kCount>(weight, from[c * kWarpSize], sums[c]);
    }
  }

  __device__ static void clear(Sums& sums) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[c][j] = 0;
    }
  }

  __device__ void store_sums(Element* row, int unit, const Sums& sums) const {
    const Columns stored(p, unit);
    Element* const to = row + stored.begin;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (!stored.has(c)) continue;
      store_raw<Element, kCount>(to + c * Columns::kStep, round_to<Element, kCount>(sums[c]));
    }
  }

  // One bit for each rank that has a row of the token.
  __device__ RankSet ranks_of(const Task& task) const {
    const int rank = lane_id() < x.top_k ? routes.ranks[task.first() + lane_id()] : -1;
    return union_of_lanes(rank >= 0 ? set_of(rank) : 0);
  }

  // This rank's partial sum of a peer's token, to the peer.
  __device__ void push(const Task& task, const Sums& sums) const {
    const int rank = task.rank();
    const int slot = slot_of(x.rank, ranks_of(task), rank);
    const int64_t row = slot_index(p.slices.quotient(task.unit), slot);
    store_sums(s.buffer<Element>(rank, kScratch) + row * p.width, task.unit, sums);
    announce(rank, task.unit, slot);
  }

  // Adds the partial sums in the slots of the peers in `ranks`, in order, to the totals.
  __device__ void add_slots(RankSet ranks, RankSet all_ranks, int unit, Sums& totals) const {
    const Columns stored(p, unit);
    const Element* const slots = static_cast<const Element*>(p.partial_sums) +
                                 slot_index(p.slices.quotient(unit), 0) * p.width + stored.begin;
    constexpr int kBatch = 2;  // partial sums in flight together
    while (ranks != 0) {
      R partials[kBatch][kColumns];
      const int count = count_ranks(ranks);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = i < count ? first_rank(ranks) : 0;
        ranks &= ranks - 1;
        const Element* slot = slots + slot_of(rank, all_ranks, x.rank) * int64_t{p.width};
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (i < count && stored.has(c)) {
            partials[i][c] = load_raw<Element, kCount>(slot + c * Columns::kStep);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) add<Element, kCount>(partials[i][c], totals[c]);
      }
    }
  }

  // All partial sums of one of this rank's tokens, in order of rank: the lower ranks', its own, and
  // the higher ranks'.
  __device__ void sum(const Task& task, Sums& sums) const {
    const RankSet ranks = ranks_of(task);
    const RankSet lower = below(x.rank);
    R own[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) own[c] = round_to<Element, kCount>(sums[c]);
    clear(sums);
    wait_for_partial_sums(ranks, task.unit);
    add_slots(ranks & lower, ranks, task.unit, sums);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) add<Element, kCount>(own[c], sums[c]);
    add_slots(ranks & ~lower & ~set_of(x.rank), ranks, task.unit, sums);
    Element* row = static_cast<Element*>(p.sums) + int64_t{p.slices.quotient(task.unit)} * p.width;
    store_sums(row, task.unit, sums);
  }
};

}  // namespace freeio::cuda
