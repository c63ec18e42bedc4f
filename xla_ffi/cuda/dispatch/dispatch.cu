// dispatch: routing, and token rows to their final places.
//
// The expert's rank pulls: it reads a token's row out of the source's tensor, once, and stores it
// to each of its rows here. So a row crosses a link once, no rank writes into a tensor of another,
// and nothing is staged. Counts and what the rows of assignments follow from go to all ranks, or,
// where there are few, the ids; all as words that carry their own flag. No data waits for a flag of
// its own.
//
// Small calls, ruled by latency, do not wait until they know where the rows go: the token's rank
// sends each row, once to each rank that needs it, in lines (lines.cuh) to the control block there,
// together with the ids. Nobody waits for the others' end then.
#include "core/layout.h"
#include "cuda/device/lines.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/dispatch/routing_by_counts.cuh"
#include "cuda/dispatch/routing_by_ids.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

constexpr int kTileAssignments = kMaxCounts;  // of all ranks, whose rows are in shared memory

// Rows here of the tile's assignments, of all ranks: [R, tokens, K] in shared memory; -1: none.
// Sent by their ranks, or read from the handles. False, for all threads: they did not come.
template <bool kRouted>
__device__ bool fetch_rows(const DispatchParams& p, Session& s, const Tile& tile, int* rows) {
  const Exchange& x = p.exchange;
  const int per_rank = tile.size() * x.top_k;
  const int64_t first = static_cast<int64_t>(tile.begin) * x.top_k;
  for (int i = static_cast<int>(threadIdx.x); i < per_rank * x.num_ranks; i += kThreads) {
    const int rank = i / per_rank;
    const int64_t a = first + i % per_rank;
    if (kRouted && rank != x.rank) {
      const Word* address = p.routes + rank * static_cast<int64_t>(x.num_tokens) * x.top_k + a;
      Word word = load_word(address);
      if (!wait_word(x, s, kWaitRoutes, rank, address, word)) break;
      rows[i] = static_cast<int>(value_of(word)) - 1;
    } else {
      const int dest = rank == x.rank ? p.dest_rank[a] : s.buffer<int32_t>(rank, kDestRank)[a];
      const int row = rank == x.rank ? p.dest_row[a] : s.buffer<int32_t>(rank, kDestRow)[a];
      rows[i] = dest == x.rank ? row : -1;
    }
  }
  return !__syncthreads_or(has_failed(s));
}

// A slice of a row, of a token of some rank. The slices of a rank's tokens are its units.
struct Slice {
  int rank;
  int token;
  int leaf = 0;
  int bytes;
  int64_t offset;  // in the row
  bool first;      // of the row

  __device__ Slice(const DispatchParams& p, int tokens_rank, int unit)
      : rank(tokens_rank), token(p.slices.quotient(unit)) {
    int slice = unit - token * p.num_slices;
    first = slice == 0;
    while (slice >= p.leaves[leaf].num_slices) slice -= p.leaves[leaf++].num_slices;
    const Leaf& it = p.leaves[leaf];
    offset = static_cast<int64_t>(slice) * it.slice_bytes;
    bytes = static_cast<int>(min(static_cast<int64_t>(it.slice_bytes), it.row_bytes - offset));
  }

  // Where it is in these tokens.
  __device__ const std::byte* in(const std::byte* tokens, const DispatchParams& p) const {
    return tokens + token * p.leaves[leaf].row_bytes + offset;
  }
};

// Where a slice goes: rows here of its token's assignments, in the lanes.
template <bool kRouted>
struct Targets {
  int row;
  uint32_t mask;  // of the lanes that have a row

  __device__ Targets(const DispatchParams& p, const Tile& tile, const int* rows,
                     const Slice& slice) {
    const Exchange& x = p.exchange;
    const int first = (slice.rank * tile.size() + slice.token - tile.begin) * x.top_k;
    row = lane_id() < x.top_k ? rows[first + lane_id()] : -1;
    mask = __ballot_sync(kFullWarp, row >= 0);
    if (kRouted && slice.first && row >= 0) {
      p.row_source[row] = (slice.rank * x.num_tokens + slice.token) * x.top_k + lane_id();
    }
  }
};

// A slice of this rank's tokens on its way to the peers that need it.
struct OutgoingSlice {
  LineSlice data;
  int id = -1;  // of the token's assignment, in the lanes

  __device__ OutgoingSlice(const DispatchParams& p, int unit, int end) {
    if (unit >= end) return;
    const Slice slice(p, p.exchange.rank, unit);
    data.load(slice.in(p.leaves[slice.leaf].tokens, p), slice.bytes);
    if (lane_id() < p.exchange.top_k) id = p.topk_idx[slice.token * p.exchange.top_k + lane_id()];
  }

  // Whole warp.
  __device__ void send(const DispatchParams& p, const Session& s, int unit) const {
    const Exchange& x = p.exchange;
    const bool valid = id >= 0 && id < x.num_experts;
    const uint32_t ranks =
        __reduce_or_sync(kFullWarp, valid ? 1u << x.local_experts.quotient(id) : 0u);
    for (int i = 0; i + 1 < x.num_ranks; ++i) {
      const int rank = rank_of_turn(x, i);
      if ((ranks >> rank & 1) != 0) data.send(slices_to(x, s, rank)[unit], s.epoch[rank]);
    }
  }
};

using DispatchTeams = Teams<kDispatchReceivers>;

// This CTA's units `mine`, the warp's first of which has been loaded. While one is sent, the next
// one is on its way already. All threads.
__device__ void send_rows(const DispatchParams& p, const Session& s, const DispatchTeams& teams,
                          const Chunk& mine, OutgoingSlice slice) {
  int unit = teams.sent_unit(mine, warp_id());
  for (int n = warp_id(); n < teams.count_sent(mine); n += kWarps) {
    const int next_unit = teams.sent_unit(mine, n + kWarps);
    const OutgoingSlice next(p, next_unit, mine.end);
    slice.send(p, s, unit);
    slice = next;
    unit = next_unit;
  }
}

// Moves a unit of `rank`'s to this rank's rows. Whole warp.
template <bool kRouted>
__device__ void pull_slice(const DispatchParams& p, const Session& s, const Tile& tile,
                           const int* rows, int rank, int unit) {
  const Slice slice(p, rank, unit);
  const Targets<kRouted> targets(p, tile, rows, slice);
  if (targets.mask == 0) return;
  const Leaf& leaf = p.leaves[slice.leaf];
  const std::byte* const tokens =
      rank == p.exchange.rank ? leaf.tokens : s.buffer<std::byte>(rank, kFirstLeaf + slice.leaf);
  with_access(leaf.access_bytes, [&](auto access) {
    Values<decltype(access)> values;
    values.load(slice.in(tokens, p), slice.bytes);
    values.store(leaf.rows + slice.offset, leaf.row_bytes, slice.bytes, targets.row, targets.mask);
  });
}

// The same where rows are sent.
struct IncomingSlice {
  LineSlice data;
  Slice slice;
  Targets<true> targets;
  const SentSlice* sent = nullptr;  // null: it is this rank's own, or not wanted

  __device__ IncomingSlice(const DispatchParams& p, const Session& s, const Tile& tile,
                           const int* rows, int rank, int unit)
      : slice(p, rank, unit), targets(p, tile, rows, slice) {
    if (targets.mask == 0) return;
    if (rank == p.exchange.rank) {
      data.load(slice.in(p.leaves[slice.leaf].tokens, p), slice.bytes);
    } else {
      sent = &slices_from(p.exchange, s, rank)[unit];
      start();
    }
  }

  __device__ void start() {
    if (sent != nullptr) data.start(*sent);
  }
  __device__ bool is_here(const Session& s) const {
    return sent == nullptr || data.is_here(s.epoch[slice.rank]);
  }
  __device__ void store(const DispatchParams& p) {
    if (sent != nullptr) data.take();
    const Leaf& leaf = p.leaves[slice.leaf];
    data.store(leaf.rows + slice.offset, leaf.row_bytes, slice.bytes, targets.row, targets.mask);
  }
};

// Moves the units of two pulls, of which there are `pulls`. Whole warp.
__device__ void move_two(const DispatchParams& p, Session& s, const Tile& tile, const int* rows,
                         int pull, int pulls, int first_unit) {
  const Exchange& x = p.exchange;
  const auto slice_of = [&](int i) {
    // This rank's own first: the others' are on their way.
    return IncomingSlice(p, s, tile, rows, source_rank(x, i + x.num_ranks - 1),
                         first_unit + x.ranks.quotient(i));
  };
  IncomingSlice a = slice_of(pull);
  IncomingSlice b = slice_of(min(pull + 1, pulls - 1));
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

// Whether the packed row belongs to no assignment.
template <bool kRouted>
__device__ bool is_padding(const DispatchParams& p, const Routing& routing, int64_t row) {
  const Exchange& x = p.exchange;
  if (row >= x.capacity) return false;
  if (!kRouted) return p.row_source[row] < 0;
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
  return static_cast<uint32_t>(row) - routing.start[low] >= routing.load[first + low];
}

template <bool kRouted>
__device__ void zero_padding(const DispatchParams& p, const Routing& routing, int64_t first_row) {
  const int64_t row = first_row + lane_id();
  const bool padding = lane_id() < p.padding.rows && is_padding<kRouted>(p, routing, row);
  if (kRouted && padding) p.row_source[row] = -1;
  for (uint32_t rest = __ballot_sync(kFullWarp, padding); rest != 0; rest &= rest - 1) {
    const int64_t zero_row = first_row + __ffs(static_cast<int>(rest)) - 1;
    for (int i = 0; i < p.num_leaves; ++i) {
      const Leaf& leaf = p.leaves[i];
      with_access(leaf.access_bytes, [&](auto access) {
        zero_bytes<decltype(access)>(leaf.rows + zero_row * leaf.row_bytes, leaf.row_bytes);
      });
    }
  }
}

template <Routes kRoutes>
constexpr bool kIsByIds = kRoutes == Routes::kByIds || kRoutes == Routes::kByIdsWithRows;

// This thread's first ids.
template <Routes kRoutes>
__device__ auto load_early(const DispatchParams& p, const Chunk& chunk) {
  if constexpr (kIsByIds<kRoutes>) {
    return IdPair(p, static_cast<int>(threadIdx.x));
  } else if constexpr (kRoutes == Routes::kByCounts) {
    return SegmentIds(p, chunk);
  } else {
    return nullptr;
  }
}

template <Routes kRoutes>
__device__ void exchange(const DispatchParams& p, Session& s, void* shared_memory) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  constexpr bool kRouted = kRoutes != Routes::kOfHandle;
  constexpr bool kSendsRows = kRoutes == Routes::kByIdsWithRows;
  int* rows = static_cast<int*>(shared_memory);
  const Routing routing(reinterpret_cast<uint32_t*>(rows + kTileAssignments), x.num_experts);
  const AllIds all_ids(routing.end(), x);
  const DispatchTeams teams{kSendsRows ? p.senders : 0};
  const Team team = teams.own();
  // Where rows are sent there are few, and several CTAs share a token.
  const Units units =
      kSendsRows ? Units(p.slices, x.num_tokens, teams) : Units(p.slices, x.num_tokens, false);
  const Chunk chunk = units.tokens();
  const Tiles tiles(chunk, kTileAssignments / (x.num_ranks * x.top_k));
  const uint32_t leaves = kSendsRows ? 0 : ((1u << p.num_leaves) - 1) << kFirstLeaf;
  // What needs no peer is loaded while the exchange opens.
  [[maybe_unused]] const auto early = load_early<kRoutes>(p, chunk);
  const bool sends_rows = kSendsRows && (!teams.has_senders() || teams.is_sender());
  const OutgoingSlice first(p, teams.sent_unit(units.chunk, warp_id()),
                            sends_rows ? units.chunk.end : 0);
  if (!open(x, s, opening)) return;
  if (kSendsRows) begin_alone(x);
  if (kSendsRows && teams.is_left_over()) return;
  if (kSendsRows && teams.is_sender()) return send_rows(p, s, teams, units.chunk, first);
  if (blockIdx.x == 0) post(x, s, kRouted ? leaves : leaves | 1u << kDestRank | 1u << kDestRow);
  if constexpr (kIsByIds<kRoutes>) {
    send_ids(p, s, all_ids, team, early);
    if (sends_rows) send_rows(p, s, teams, units.chunk, first);
    clear_counts(x, routing);
  }
  const auto work_of = [&](const Tile& tile) {
    const int pulls = units.of(tile).size() * x.num_ranks;
    return Work(tile, kSendsRows ? (pulls + 1) / 2 : pulls, true, p.padding, team);
  };
  Work work = work_of(tiles[0]);
  if constexpr (kIsByIds<kRoutes>) {
    receive_ids(x, s, all_ids);
    if (!receive_addresses(x, s, leaves)) return;
    count_ids(x, routing, all_ids);
    place_groups(p, routing);
  } else if constexpr (kRoutes == Routes::kByCounts) {
    if (!p.sends_places) prepare_routes(p, chunk, s);
    const int id = first_id(p, chunk);
    const Segment& segment = early.segment;
    count_and_send(p, s, routing, segment, early.quads);
    __syncthreads();
    if (p.sends_places) send_places(p, s, routing, chunk, id);
    receive_counts(p, s, routing, segment, reinterpret_cast<uint32_t*>(rows));
    if (!receive_addresses(x, s, p.sends_places ? leaves : leaves | 1u << kScratch)) return;
    place_groups(p, routing);
    if (blockIdx.x == 0 && warp_id() == 0) store_num_invalid(p, s);
    if (!p.sends_places) assign_rows(p, s, routing, chunk, id);
    __syncthreads();
  } else {
    if (!receive_addresses(x, s, leaves | 1u << kDestRank | 1u << kDestRow)) return;
  }
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    if constexpr (kIsByIds<kRoutes>) {
      find_rows(p, routing, all_ids, tile, rows);
    } else if (kRoutes == Routes::kByCounts && p.sends_places) {
      if (!find_rows(p, s, routing, tile, rows)) return;
    } else if (!fetch_rows<kRouted>(p, s, tile, rows)) {
      return;
    }
    if (tile.number > 0) work = work_of(tile);
    const Chunk mine = units.of(tile);
    const auto zero = [&](int64_t row) { zero_padding<kRouted>(p, routing, row); };
    if constexpr (kSendsRows) {
      const int pulls = mine.size() * x.num_ranks;
      const auto move_pair = [&](int pair) {
        move_two(p, s, tile, rows, 2 * pair, pulls, mine.begin);
      };
      run_work(work, s, move_pair, zero);
    } else {
      const auto pull_one = [&](int pull) {
        const int unit = mine.begin + x.ranks.quotient(pull);
        pull_slice<kRouted>(p, s, tile, rows, source_rank(x, pull), unit);
      };
      run_work(work, s, pull_one, zero);
    }
  });
  if constexpr (kSendsRows) {
    finish_alone(x, s);
  } else {
    // Nothing has been stored to a peer but words that carry their flags, and what has been loaded
    // from one is here: it has been stored to this rank's rows.
    finish<false>(x, s);
  }
}

template <bool kRouted>
__device__ void spoil_results(const DispatchParams& p, const Share& share) {
  const Exchange& x = p.exchange;
  for (int i = 0; i < p.num_leaves; ++i) {
    spoil(share, p.leaves[i].rows, p.leaves[i].row_bytes * x.capacity);
  }
  if (!kRouted) return;
  const int64_t assignments = static_cast<int64_t>(x.num_tokens) * x.top_k;
  const int64_t int_bytes = sizeof(int32_t);
  const int experts = x.num_experts / x.num_ranks;
  spoil(share, p.dest_rank, assignments * int_bytes);
  spoil(share, p.dest_row, assignments * int_bytes);
  spoil(share, p.row_source, x.capacity * int_bytes);
  spoil(share, p.expert_load, experts * int_bytes);
  spoil(share, p.num_dropped, int_bytes);
  spoil(share, p.num_invalid, int_bytes);
  // Sizes that a matrix product can live with.
  if (share.number != 0) return;
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) p.group_sizes[e] = 0;
}

template <Routes kRoutes>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ Session s;
  exchange<kRoutes>(p, s, dynamic_shared_memory<void>());
  leave(p.exchange, s,
        [&](const Share& share) { spoil_results<kRoutes != Routes::kOfHandle>(p, share); });
}

}  // namespace

size_t dispatch_shared_bytes(Routes routes, int num_experts, int assignments_of_all) {
  const size_t experts =
      routes == Routes::kOfHandle ? 0 : round_up(kArraysOverExperts * int64_t{num_experts}, 4);
  const bool by_ids = routes == Routes::kByIds || routes == Routes::kByIdsWithRows;
  const size_t ids = by_ids ? assignments_of_all + AllIds::kPerLane : 0;
  return sizeof(uint32_t) * (kTileAssignments + experts) + sizeof(uint16_t) * ids;
}

const void* dispatch_function(Routes routes) {
  switch (routes) {
    case Routes::kOfHandle:
      return reinterpret_cast<const void*>(&dispatch_kernel<Routes::kOfHandle>);
    case Routes::kByCounts:
      return reinterpret_cast<const void*>(&dispatch_kernel<Routes::kByCounts>);
    case Routes::kByIds:
      return reinterpret_cast<const void*>(&dispatch_kernel<Routes::kByIds>);
    case Routes::kByIdsWithRows:
      break;
  }
  return reinterpret_cast<const void*>(&dispatch_kernel<Routes::kByIdsWithRows>);
}

}  // namespace freeio::cuda
