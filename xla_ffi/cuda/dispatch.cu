// dispatch: routing, and token rows to their final places.
//
// The expert's rank pulls: it reads a token's row out of the source's tensor, once, and stores it
// to each of its rows here. So a row crosses a link once, no rank writes into a tensor of another,
// and nothing is staged. Flags: counts and then routes (which row each assignment gets) go to all
// peers, or, where there are few, the ids; all as words that carry their own flag. No data waits
// for a flag of its own.
#include "core/layout.h"
#include "cuda/async_copy.cuh"
#include "cuda/kernels.h"
#include "cuda/routing_by_counts.cuh"
#include "cuda/routing_by_ids.cuh"
#include "cuda/rows.cuh"
#include "cuda/shared_memory.cuh"

namespace freeio::cuda {
namespace {

constexpr int kTileAssignments = 8192;  // of all ranks, whose rows are in shared memory

// Rows here of the tile's assignments, of all ranks: [R, tokens, K] in shared memory; -1: none.
// False, for all threads: they did not come.
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

// What one pull moves.
struct Slice {
  int rank;  // of the token
  int tile_token;
  int leaf;
  int bytes;
  int64_t offset;  // in the row
  bool first;      // of the row

  __device__ Slice(const DispatchParams& p, int pull)
      : rank(source_rank(p.exchange, pull)), leaf(0) {
    const int unit = p.exchange.ranks.quotient(pull);
    tile_token = p.slices.quotient(unit);
    int slice = unit - tile_token * p.num_slices;
    first = slice == 0;
    while (slice >= p.leaves[leaf].num_slices) slice -= p.leaves[leaf++].num_slices;
    const Leaf& it = p.leaves[leaf];
    offset = static_cast<int64_t>(slice) * it.slice_bytes;
    bytes = static_cast<int>(min(static_cast<int64_t>(it.slice_bytes), it.row_bytes - offset));
  }

  __device__ const std::byte* source(const DispatchParams& p, const Session& s,
                                     const Tile& tile) const {
    const Leaf& it = p.leaves[leaf];
    const std::byte* tokens =
        rank == p.exchange.rank ? it.tokens : s.buffer<std::byte>(rank, kFirstLeaf + leaf);
    return tokens + (tile.begin + tile_token) * it.row_bytes + offset;
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
    const int first = (slice.rank * tile.size() + slice.tile_token) * x.top_k;
    row = lane_id() < x.top_k ? rows[first + lane_id()] : -1;
    mask = __ballot_sync(kFullWarp, row >= 0);
    if (kRouted && slice.first && row >= 0) {
      const int token = tile.begin + slice.tile_token;
      p.row_source[row] = (slice.rank * x.num_tokens + token) * x.top_k + lane_id();
    }
  }
};

constexpr int kPrefetched = kCopySlice * static_cast<int>(sizeof(uint4));  // bytes of one warp

// The first slice that a warp pulls, fetched to shared memory before its places are known.
struct Prefetched {
  const std::byte* data = nullptr;
  int pull = -1;  // -1: none

  // Starts it if the token has an expert here. Whole warp.
  __device__ void start(const DispatchParams& p, const Session& s, const AllIds& ids,
                        const Tile& tile, const Work& work, std::byte* memory) {
    if (!p.prefetches || warp_id() >= work.size()) return;
    const int blocks = work.blocks_before(warp_id());
    if (work.blocks_before(warp_id() + 1) > blocks) return;
    const Slice slice(p, warp_id() - blocks);
    if (p.leaves[slice.leaf].access_bytes != sizeof(uint4)) return;
    if (!ids.any_on(p.exchange, p.exchange.rank, slice.rank, tile.begin + slice.tile_token)) return;
    std::byte* const target = memory + warp_id() * kPrefetched;
    const std::byte* const source = slice.source(p, s, tile);
    constexpr int kAccess = sizeof(uint4);
    for (int at = lane_id() * kAccess; at < slice.bytes; at += kWarpSize * kAccess) {
      copy_async<kAccess>(target + at, source + at);
    }
    commit_copies();
    data = target;
    pull = warp_id() - blocks;
  }
};

template <bool kRouted>
__device__ void pull_slice(const DispatchParams& p, const Session& s, const Tile& tile,
                           const int* rows, int pull, const Prefetched& prefetched) {
  const Slice slice(p, pull);
  const Targets<kRouted> targets(p, tile, rows, slice);
  if (targets.mask == 0) return;
  const Leaf& leaf = p.leaves[slice.leaf];
  const std::byte* source = slice.source(p, s, tile);
  if (pull == prefetched.pull) {
    wait_for_copies<0>();
    source = prefetched.data;
  }
  with_access(leaf.access_bytes, [&](auto access) {
    Values<decltype(access)> values;
    values.load(source, slice.bytes);
    values.store(leaf.rows + slice.offset, leaf.row_bytes, slice.bytes, targets.row, targets.mask);
  });
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

// This thread's first ids.
template <Routes kRoutes>
__device__ auto load_early(const DispatchParams& p) {
  if constexpr (kRoutes == Routes::kByIds) {
    return IdPair(p, static_cast<int>(threadIdx.x));
  } else if constexpr (kRoutes == Routes::kByCounts) {
    return IdQuads(p, static_cast<int>(threadIdx.x));
  } else {
    return nullptr;
  }
}

template <Routes kRoutes>
__device__ void exchange(const DispatchParams& p, Session& s, void* shared_memory) {
  const Exchange& x = p.exchange;
  constexpr bool kRouted = kRoutes != Routes::kOfHandle;
  int* rows = static_cast<int*>(shared_memory);
  const Routing routing(reinterpret_cast<uint32_t*>(rows + kTileAssignments), x.num_experts);
  const AllIds all_ids(routing.end(), x);
  const Chunk chunk(x.num_tokens);
  const Tiles tiles(chunk, kTileAssignments / (x.num_ranks * x.top_k));
  const auto work_of = [&](const Tile& tile) {
    return Work(tile, p.num_slices * x.num_ranks, true, p.padding);
  };
  Prefetched prefetched;
  const uint32_t leaves = ((1u << p.num_leaves) - 1) << kFirstLeaf;
  // What needs no peer is loaded while the exchange opens.
  [[maybe_unused]] const auto early = load_early<kRoutes>(p);
  if (!open(x, s)) return;
  if (blockIdx.x == 0) post(x, s, kRouted ? leaves : leaves | 1u << kDestRank | 1u << kDestRow);
  if constexpr (kRoutes == Routes::kByIds) {
    send_ids(p, s, all_ids, early);
    clear_counts(x, routing);
    receive_ids(x, s, all_ids);
    if (!receive_addresses(x, s, leaves)) return;
    prefetched.start(p, s, all_ids, tiles[0], work_of(tiles[0]), all_ids.end(x));
    count_ids(x, routing, all_ids);
    place_groups(p, routing);
  } else if constexpr (kRoutes == Routes::kByCounts) {
    prepare_routes(p, chunk, s);
    count(p, routing, chunk, early);
    if (blockIdx.x == 0) send_counts(x, s, routing);
    const int id = first_id(p, chunk);
    receive_counts(x, s, routing);
    if (!receive_addresses(x, s, leaves | 1u << kScratch)) return;
    place_groups(p, routing);
    assign_rows(p, s, routing, chunk, id);
    __syncthreads();
  } else {
    if (!receive_addresses(x, s, leaves | 1u << kDestRank | 1u << kDestRow)) return;
  }
  tiles.for_each(s, [&](const Tile& tile) {
    if constexpr (kRoutes == Routes::kByIds) {
      find_rows(p, routing, all_ids, tile, rows);
    } else if (!fetch_rows<kRouted>(p, s, tile, rows)) {
      return;
    }
    run_work(
        work_of(tile), s,
        [&](int pull) { pull_slice<kRouted>(p, s, tile, rows, pull, prefetched); },
        [&](int64_t row) { zero_padding<kRouted>(p, routing, row); });
    // Of a token whose assignments did not fit, nobody has waited for it.
    wait_for_copies<0>();
    prefetched.pull = -1;
  });
  // Nothing has been stored to a peer but words that carry their flags, and what has been loaded
  // from one is here: it has been stored to this rank's rows.
  finish<false>(x, s);
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

size_t prefetch_bytes() { return kWarps * kPrefetched; }

size_t dispatch_shared_bytes(Routes routes, int num_experts, int assignments_of_all) {
  const size_t experts =
      routes == Routes::kOfHandle ? 0 : round_up(kArraysOverExperts * int64_t{num_experts}, 4);
  const size_t ids = routes == Routes::kByIds ? assignments_of_all + AllIds::kPerLane : 0;
  return sizeof(uint32_t) * (kTileAssignments + experts) + sizeof(uint16_t) * ids;
}

const void* dispatch_function(Routes routes) {
  switch (routes) {
    case Routes::kOfHandle:
      return reinterpret_cast<const void*>(&dispatch_kernel<Routes::kOfHandle>);
    case Routes::kByCounts:
      return reinterpret_cast<const void*>(&dispatch_kernel<Routes::kByCounts>);
    case Routes::kByIds:
      break;
  }
  return reinterpret_cast<const void*>(&dispatch_kernel<Routes::kByIds>);
}

}  // namespace freeio::cuda
