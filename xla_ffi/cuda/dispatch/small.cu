// dispatch of small calls, whose time is mostly latency. No rank waits until it knows where rows
// go. The token's rank sends each row once to each rank that needs it, in lines (lines.cuh), to the
// GPU block there. The ids travel at the same time. No rank waits for the end of another.
//
// There is one kernel for rows that are accessed 16 bytes at a time, and others for smaller
// accesses.
#include "cuda/device/lines.cuh"
#include "cuda/device/opening.cuh"
#include "cuda/device/rank_set.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/dispatch/routing_by_ids.cuh"
#include "cuda/dispatch/slices.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

using DispatchTeams = Teams<kDispatchReceivers>;

// A slice of this rank's tokens on its way to the peers that need it.
template <typename Access>
struct OutgoingSlice {
  LineSlice data;
  int id = -1;  // of the token's assignment, in the lanes

  __device__ OutgoingSlice(const DispatchParams& p, int unit, int end) {
    if (unit >= end) return;
    const Slice slice(p, p.exchange.rank, unit);
    const SlicedLeaf& leaf = p.leaves[slice.leaf];
    data.template load<Access>(slice.in(leaf.tokens, p), slice.bytes);
    if (lane_id() < p.exchange.top_k) id = p.topk_idx[slice.token * p.exchange.top_k + lane_id()];
  }

  // Whole warp.
  __device__ void send(const DispatchParams& p, const CtaState& s, int unit) const {
    const Exchange& x = p.exchange;
    const bool valid = id >= 0 && id < x.num_experts;
    const RankSet ranks = union_of_lanes(valid ? set_of(x.local_experts.quotient(id)) : 0);
    for (int i = 0; i + 1 < x.num_ranks; ++i) {
      const int rank = rank_of_turn(x, i);
      if (contains(ranks, rank)) data.send(slices_to(x, s, rank)[unit], s.epoch[rank]);
    }
  }
};

// Sends this CTA's units `mine`. The warp's first one has been loaded. While the warp sends a unit,
// it loads the next one. All threads.
template <typename Access>
__device__ void send_rows(const DispatchParams& p, const CtaState& s, const DispatchTeams& teams,
                          const Chunk& mine, OutgoingSlice<Access> slice) {
  int unit = teams.sent_unit(mine, warp_id());
  for (int n = warp_id(); n < teams.count_sent(mine); n += kWarps) {
    const int next_unit = teams.sent_unit(mine, n + kWarps);
    const OutgoingSlice<Access> next(p, next_unit, mine.end);
    slice.send(p, s, unit);
    slice = next;
    unit = next_unit;
  }
}

// A slice of some rank's tokens on its way to its rows here.
template <typename Access>
struct IncomingSlice {
  LineSlice data;
  Slice slice;
  Targets targets;
  const SentSlice* sent = nullptr;  // null: it is this rank's own, or not wanted

  __device__ IncomingSlice(const DispatchParams& p, const CtaState& s, const Tile& tile,
                           const int* rows, int rank, int unit)
      : slice(p, rank, unit), targets(p, tile, rows, slice) {
    targets.write_sources(p, slice);
    if (targets.mask == 0) return;
    if (rank == p.exchange.rank) {
      const SlicedLeaf& leaf = p.leaves[slice.leaf];
      data.template load<Access>(slice.in(leaf.tokens, p), slice.bytes);
    } else {
      sent = &slices_from(p.exchange, s, rank)[unit];
      start();
    }
  }

  __device__ void start() {
    if (sent != nullptr) data.start(*sent);
  }
  __device__ bool is_here(const CtaState& s) const {
    return sent == nullptr || data.is_here(s.epoch[slice.rank]);
  }
  __device__ void store(const DispatchParams& p) {
    if (sent != nullptr) data.take();
    const SlicedLeaf& leaf = p.leaves[slice.leaf];
    data.template store<Access>(leaf.rows + slice.offset, leaf.row_bytes, slice.bytes, targets.row,
                                targets.mask);
  }
};

// Moves the slices of `pull` and of the next one, if there is one among the `pulls`. Whole warp.
template <typename Access>
__device__ void move_two(const DispatchParams& p, CtaState& s, const Tile& tile, const int* rows,
                         int pull, int pulls, int first_unit) {
  const Exchange& x = p.exchange;
  const auto slice_of = [&](int i) {
    // This rank's own first: the others' are on their way.
    return IncomingSlice<Access>(p, s, tile, rows, source_rank(x, i + x.num_ranks - 1),
                                 first_unit + x.ranks.quotient(i));
  };
  IncomingSlice<Access> a = slice_of(pull);
  IncomingSlice<Access> b = slice_of(min(pull + 1, pulls - 1));
  if (pull + 1 == pulls) b.targets.mask = 0;
  while (!__all_sync(kFullWarp, a.is_here(s) && b.is_here(s))) {
    const int which = slice_of_lane();
    const int peer = which == 0 ? a.slice.rank : b.slice.rank;
    const SentSlice* const sent = which == 0 ? a.sent : which == 1 ? b.sent : nullptr;
    if (!wait_for_lines(x, s, kWaitRows, peer, sent)) return;
    a.start();
    b.start();
  }
  a.store(p);
  b.store(p);
}

// A tile's work: its pulls two by two.
__device__ Work work_of(const DispatchParams& p, const Units& units, const Tile& tile,
                        const Team& team) {
  const int pulls = units.of(tile).size() * p.exchange.num_ranks;
  return Work(tile, (pulls + 1) / 2, p.padding, team);
}

template <typename Access>
__device__ void exchange(const DispatchParams& p, CtaState& s, int* rows) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Routing routing(reinterpret_cast<uint32_t*>(rows + kTileAssignments), x.num_experts);
  const AllIds all_ids(routing.end(), x);
  const DispatchTeams teams{p.senders};
  const Team team = teams.own();
  const bool sends = !teams.has_senders() || teams.is_sender();
  // There are few tokens, so several CTAs share one.
  const Units units(p.slices, x.num_tokens, teams);
  const Tiles tiles(units.tokens(), kTileAssignments / (x.num_ranks * x.top_k));
  // These loads need no peer, so they run while the exchange opens.
  const IdPair early(p, static_cast<int>(threadIdx.x));
  const OutgoingSlice<Access> first(p, teams.sent_unit(units.chunk, warp_id()),
                                    sends ? units.chunk.end : 0);
  if (!open(x, s, opening)) return;
  begin_alone(x);
  if (teams.is_left_over()) return;
  enter(s, teams.is_sender() ? kMoving : kRouting);
  if (teams.is_sender()) return send_rows(p, s, teams, units.chunk, first);
  if (blockIdx.x == 0) post(x, s, 0);
  send_ids(p, s, all_ids, team, early);
  enter(s, kMoving);
  if (sends) send_rows(p, s, teams, units.chunk, first);
  enter(s, kRouting);
  clear_counts(x, routing);
  Work work = work_of(p, units, tiles[0], team);
  enter(s, kAgreeing);
  receive_ids(x, s, all_ids);
  if (!receive_addresses(x, s, 0)) return;
  enter(s, kRouting);
  count_ids(x, routing, all_ids);
  place_groups(p, routing);
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    enter(s, kRouting);
    find_rows(p, routing, all_ids, tile, rows);
    enter(s, kMoving);
    if (tile.number > 0) work = work_of(p, units, tile, team);
    const Chunk mine = units.of(tile);
    const int pulls = mine.size() * x.num_ranks;
    const auto move_pair = [&](int pair) {
      move_two<Access>(p, s, tile, rows, 2 * pair, pulls, mine.begin);
    };
    run_work(work, s, move_pair, [&](int64_t first_row) { zero_padding(p, routing, first_row); });
  });
  finish_alone(x, s);
}

template <typename Access>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_small_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ CtaState s;
  exchange<Access>(p, s, dynamic_shared_memory<int>());
  leave(p.exchange, s, [&](const Team& spoilers) { spoil_results(p, spoilers); });
}

}  // namespace

Kernel dispatch_small(int num_experts, int assignments_of_all, int access_bytes) {
  const auto kernel = access_bytes >= 16  ? &dispatch_small_kernel<InWhole>
                      : access_bytes >= 4 ? &dispatch_small_kernel<InParts<uint32_t>>
                      : access_bytes == 2 ? &dispatch_small_kernel<InParts<uint16_t>>
                                          : &dispatch_small_kernel<InParts<uint8_t>>;
  return {reinterpret_cast<const void*>(kernel), sizeof(int) * kTileAssignments +
                                                     routing_bytes(num_experts) +
                                                     all_ids_bytes(assignments_of_all)};
}

}  // namespace freeio::cuda
