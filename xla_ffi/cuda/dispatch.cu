// dispatch: routing, and token rows to their final places.
//
// The expert's rank pulls: it reads a token's row out of the source's tensor, once, and stores it
// to each of its rows here. So a row crosses a link once, no rank writes into a tensor of another,
// and nothing is staged. Flags: counts go to all peers, routes (which row each assignment gets) to
// all peers, both as words that carry their own flag; no data waits for a flag of its own.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"
#include "cuda/shared_memory.cuh"

namespace freeio::cuda {
namespace {

constexpr int kTileAssignments = 8192;  // of all ranks, whose rows are in shared memory

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
        start(next + num_experts) {}
};

// Route words start as "not arrived": XLA's buffer may hold anything, an old call's words too. Each
// CTA clears the words that it waits for: no other barrier stands between the two.
__device__ void prepare_routes(const DispatchParams& p, Session& s, const Chunk& chunk) {
  const Exchange& x = p.exchange;
  if (x.num_ranks == 1) return;
  const int64_t num_assignments = static_cast<int64_t>(x.num_tokens) * x.top_k;
  const int end = chunk.end * x.top_k;
  for (int rank = 0; rank < x.num_ranks; ++rank) {
    if (rank == x.rank) continue;
    Word* words = p.routes + rank * num_assignments;
    for (int i = chunk.begin * x.top_k + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      words[i] = 0;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && add_acquire_release_device(&self(x).prepared, 1) == gridDim.x - 1) {
    fence_system();
    post_address(x, s, kScratch, p.routes);
  }
}

__device__ void count_one(const Exchange& x, const Routing& routing, int id, bool earlier,
                          int& invalid) {
  if (id >= 0 && id < x.num_experts) {
    atomicAdd(earlier ? &routing.before[id] : &routing.count[id], 1u);
  } else {
    invalid += id != -1;
  }
}

// Every CTA counts all of this rank's assignments: cheaper than a barrier of the grid up to 10^5.
__device__ void count(const DispatchParams& p, const Routing& routing, const Chunk& chunk) {
  const Exchange& x = p.exchange;
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.before[e] = routing.count[e] = 0;
  }
  __shared__ int all_invalid;
  if (threadIdx.x == 0) all_invalid = 0;
  __syncthreads();
  const int assignments = x.num_tokens * x.top_k;
  const int begin = chunk.begin * x.top_k;
  int invalid = 0;
  constexpr int kQuads = 4;
  const auto* quads = reinterpret_cast<const int4*>(p.topk_idx);
  for (int base = static_cast<int>(threadIdx.x); base < assignments / 4;
       base += kQuads * kThreads) {
    int4 ids[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int quad = base + i * kThreads;
      if (quad < assignments / 4) ids[i] = quads[quad];
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int quad = base + i * kThreads;
      if (quad >= assignments / 4) break;
      count_one(x, routing, ids[i].x, quad * 4 < begin, invalid);
      count_one(x, routing, ids[i].y, quad * 4 + 1 < begin, invalid);
      count_one(x, routing, ids[i].z, quad * 4 + 2 < begin, invalid);
      count_one(x, routing, ids[i].w, quad * 4 + 3 < begin, invalid);
    }
  }
  const int rest = assignments / 4 * 4 + static_cast<int>(threadIdx.x);
  if (rest < assignments) count_one(x, routing, p.topk_idx[rest], rest < begin, invalid);
  if (blockIdx.x == 0 && invalid != 0) atomicAdd(&all_invalid, invalid);
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.num_invalid = all_invalid;
}

__device__ void send_counts(const Exchange& x, const Session& s, const Routing& routing) {
  for (int i = static_cast<int>(threadIdx.x); i < x.num_ranks * x.num_experts; i += kThreads) {
    const int rank = i / x.num_experts;
    const int e = i % x.num_experts;
    if (rank == x.rank) continue;
    store_word(&mailbox(x, s, rank, x.rank).counts[e],
               make_word(s.epoch[rank], routing.before[e] + routing.count[e]));
  }
}

// Adds up the counts of all ranks: load, and in `next` the rows of earlier sources and chunks.
__device__ void receive_counts(const Exchange& x, Session& s, const Routing& routing) {
  constexpr int kBatch = 8;
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    uint32_t load = routing.before[e] + routing.count[e];
    uint32_t earlier = routing.before[e];
    for (int first = 0; first < x.num_ranks; first += kBatch) {
      Word words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = first + i;
        if (rank < x.num_ranks && rank != x.rank) {
          words[i] = load_word(&mailbox(x, s, x.rank, rank).counts[e]);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = first + i;
        if (rank >= x.num_ranks || rank == x.rank) continue;
        if (!wait_word(x, s, kWaitCounts, rank, &mailbox(x, s, x.rank, rank).counts[e], words[i])) {
          break;
        }
        load += value_of(words[i]);
        if (rank < x.rank) earlier += value_of(words[i]);
      }
    }
    routing.load[e] = load;
    routing.next[e] = earlier;
  }
}

__device__ int64_t sum_of_lanes_before(int64_t value, int64_t& all) {
  int64_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane_id() >= distance) sum += other;
  }
  all = __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  return sum - value;
}

// First rows of the groups: one warp for each rank's experts. Row numbers stop at capacity, past
// which nothing is stored, so they fit whatever the alignment adds.
__device__ void place_groups(const DispatchParams& p, const Routing& routing) {
  const Exchange& x = p.exchange;
  const int experts = x.num_experts / x.num_ranks;
  for (int rank = warp_id(); rank < x.num_ranks; rank += kWarps) {
    int64_t before = 0;
    int dropped = 0;
    for (int first = 0; first < experts; first += kWarpSize) {
      const int group = first + lane_id();
      const int e = rank * experts + group;
      const int64_t load = group < experts ? routing.load[e] : 0;
      // A division of 64 bits takes longer than all the rest here.
      const int64_t padded =
          x.alignment == 1 ? load : (load + x.alignment - 1) / x.alignment * x.alignment;
      int64_t all;
      const int64_t start = before + sum_of_lanes_before(padded, all);
      before += all;
      if (group >= experts) continue;
      const auto first_row = static_cast<uint32_t>(min(start, static_cast<int64_t>(x.capacity)));
      routing.next[e] += first_row;
      if (rank != x.rank) continue;
      routing.start[group] = first_row;
      if (blockIdx.x != 0) continue;
      const auto end = static_cast<uint32_t>(min(start + padded, static_cast<int64_t>(x.capacity)));
      const int size = static_cast<int>(end - first_row);
      p.expert_load[group] = static_cast<int>(load);
      p.group_sizes[group] = size;
      dropped += max(static_cast<int>(load) - size, 0);
    }
    if (rank == x.rank && blockIdx.x == 0) {
      dropped = __reduce_add_sync(kFullWarp, dropped);
      if (lane_id() == 0) *p.num_dropped = dropped;
    }
  }
  __syncthreads();
}

// Ids of a few warps' worth of the chunk's assignments, in the lanes of one warp.
struct Ids {
  static constexpr int kCount = 4;
  int ids[kCount];

  __device__ Ids(const int32_t* topk_idx, int first, int end) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int a = first + i * kWarpSize + lane_id();
      ids[i] = a < end ? topk_idx[a] : -1;
    }
  }
};

// Gives the chunk's assignments their rows, in order, and tells the ranks. One warp, which has
// loaded the first ids before it waited for the counts.
__device__ void assign_rows(const DispatchParams& p, const Session& s, const Routing& routing,
                            const Chunk& chunk, Ids ids) {
  const Exchange& x = p.exchange;
  const int experts = x.num_experts / x.num_ranks;
  const int64_t num_assignments = static_cast<int64_t>(x.num_tokens) * x.top_k;
  const int end = chunk.end * x.top_k;
  constexpr int kStep = Ids::kCount * kWarpSize;
  for (int first = chunk.begin * x.top_k; first < end; first += kStep) {
    const Ids next_ids(p.topk_idx, first + kStep, end);
#pragma unroll
    for (int i = 0; i < Ids::kCount; ++i) {
      if (first + i * kWarpSize >= end) break;
      const int a = first + i * kWarpSize + lane_id();
      const int id = ids.ids[i];
      const bool valid = id >= 0 && id < x.num_experts;
      const uint32_t same = __match_any_sync(kFullWarp, valid ? id : -1);
      const uint32_t earlier = __popc(same & ((1u << lane_id()) - 1));
      const uint32_t row = valid ? routing.next[id] + earlier : 0;
      __syncwarp();
      if (valid && earlier == 0) routing.next[id] += __popc(same);
      __syncwarp();
      if (a >= end) continue;
      const bool kept = valid && row < static_cast<uint32_t>(x.capacity);
      const int dest = kept ? id / experts : -1;
      p.dest_rank[a] = dest;
      p.dest_row[a] = kept ? static_cast<int>(row) : -1;
      for (int rank = 0; rank < x.num_ranks; ++rank) {
        if (rank == x.rank) continue;
        store_word(s.buffer<Word>(rank, kScratch) + x.rank * num_assignments + a,
                   make_word(s.epoch[rank], dest == rank ? row + 1 : 0));
      }
    }
    ids = next_ids;
  }
}

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
      : rank(source_rank(p.exchange, pull)),
        tile_token(pull / p.exchange.num_ranks / p.num_slices),
        leaf(0) {
    int slice = pull / p.exchange.num_ranks % p.num_slices;
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

template <bool kRouted>
__device__ void pull_slice(const DispatchParams& p, const Session& s, const Tile& tile,
                           const int* rows, int pull) {
  const Slice slice(p, pull);
  const Targets<kRouted> targets(p, tile, rows, slice);
  if (targets.mask == 0) return;
  const Leaf& leaf = p.leaves[slice.leaf];
  const std::byte* source = slice.source(p, s, tile);
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
  const bool padding = lane_id() < kBlockRows && is_padding<kRouted>(p, routing, row);
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

template <bool kRouted>
__device__ void post_buffers(const DispatchParams& p, const Session& s) {
  const Exchange& x = p.exchange;
  post_signature(x, s);
  if (threadIdx.x != 0) return;
  if (!kRouted) {
    post_address(x, s, kDestRank, p.dest_rank);
    post_address(x, s, kDestRow, p.dest_row);
  }
  for (int i = 0; i < p.num_leaves; ++i) post_address(x, s, kFirstLeaf + i, p.leaves[i].tokens);
}

template <bool kRouted>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ Session s;
  const Exchange& x = p.exchange;
  int* rows = dynamic_shared_memory<int>();
  const Routing routing(reinterpret_cast<uint32_t*>(rows + kTileAssignments), x.num_experts);
  const Chunk chunk(x.num_tokens);
  const Tiles tiles(chunk, kTileAssignments / (x.num_ranks * x.top_k));
  if (!open(x, s)) return;
  if (blockIdx.x == 0) post_buffers<kRouted>(p, s);
  if constexpr (kRouted) {
    prepare_routes(p, s, chunk);
    count(p, routing, chunk);
    if (blockIdx.x == 0) send_counts(x, s, routing);
  }
  const Ids ids(p.topk_idx, chunk.begin * x.top_k, kRouted ? chunk.end * x.top_k : 0);
  if constexpr (kRouted) receive_counts(x, s, routing);
  const uint32_t leaves = ((1u << p.num_leaves) - 1) << kFirstLeaf;
  const uint32_t others = kRouted ? 1u << kScratch : 1u << kDestRank | 1u << kDestRow;
  if (!receive_addresses(x, s, leaves | others)) return;
  if constexpr (kRouted) {
    place_groups(p, routing);
    if (warp_id() == 0) assign_rows(p, s, routing, chunk, ids);
    __syncthreads();
  }
  tiles.for_each(s, [&](const Tile& tile) {
    if (!fetch_rows<kRouted>(p, s, tile, rows)) return;
    const Work work(tile, p.num_slices * x.num_ranks, x.capacity, p.row_stride);
    run_work(
        work, s, [&](int pull) { pull_slice<kRouted>(p, s, tile, rows, pull); },
        [&](int64_t row) { zero_padding<kRouted>(p, routing, row); });
  });
  finish(x, s);
}

}  // namespace

size_t dispatch_shared_bytes(int num_experts) {
  return sizeof(uint32_t) * (kTileAssignments + 5 * num_experts);
}

const void* dispatch_function(bool routed) {
  return routed ? reinterpret_cast<const void*>(&dispatch_kernel<true>)
                : reinterpret_cast<const void*>(&dispatch_kernel<false>);
}

}  // namespace freeio::cuda
