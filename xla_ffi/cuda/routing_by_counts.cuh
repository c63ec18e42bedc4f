// Routing by counts: each rank tells the others how many rows it has for each expert, gives its own
// assignments their rows, and tells the others those.
#pragma once

#include "cuda/groups.cuh"

namespace freeio::cuda {

// Route words start as "not arrived": XLA's buffer may hold anything, an old call's words too. Each
// CTA clears those that it is to read itself: it waits for no other CTA before it does.
__device__ inline void prepare_routes(const DispatchParams& p, const Chunk& chunk, Session& s) {
  const Exchange& x = p.exchange;
  if (x.num_ranks == 1) return;
  const int64_t of_rank = static_cast<int64_t>(x.num_tokens) * x.top_k;
  for (int rank = 0; rank < x.num_ranks; ++rank) {
    if (rank == x.rank) continue;
    Word* words = p.routes + rank * of_rank;
    const int end = chunk.end * x.top_k;
    for (int a = chunk.begin * x.top_k + static_cast<int>(threadIdx.x); a < end; a += kThreads) {
      words[a] = 0;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && add_acquire_release_device(&self(x).prepared, 1) == gridDim.x - 1) {
    fence_system();
    post_address(x, s, kScratch);
  }
}

__device__ inline void count_one(const Exchange& x, const Routing& routing, int id, bool earlier,
                                 int& invalid) {
  if (id >= 0 && id < x.num_experts) {
    atomicAdd(earlier ? &routing.before[id] : &routing.count[id], 1u);
  } else {
    invalid += id != -1;
  }
}

// Every CTA counts all of this rank's assignments: cheaper than a barrier of the grid up to 10^5.
__device__ inline void count(const DispatchParams& p, const Routing& routing, const Chunk& chunk) {
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

__device__ inline void send_counts(const Exchange& x, const Session& s, const Routing& routing) {
  for (int i = static_cast<int>(threadIdx.x); i < x.num_ranks * x.num_experts; i += kThreads) {
    const int rank = i / x.num_experts;
    const int e = i % x.num_experts;
    if (rank == x.rank) continue;
    store_word(&mailbox(x, rank, x.rank).routing[e],
               make_word(s.epoch[rank], routing.before[e] + routing.count[e]));
  }
}

// Adds up the counts of all ranks: load, and in `next` the rows of earlier sources and chunks.
__device__ inline void receive_counts(const Exchange& x, Session& s, const Routing& routing) {
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
          words[i] = load_word(&mailbox(x, x.rank, rank).routing[e]);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = first + i;
        if (rank >= x.num_ranks || rank == x.rank) continue;
        if (!wait_word(x, s, kWaitCounts, rank, &mailbox(x, x.rank, rank).routing[e], words[i])) {
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
__device__ inline void assign_rows(const DispatchParams& p, const Session& s,
                                   const Routing& routing, const Chunk& chunk, Ids ids) {
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

}  // namespace freeio::cuda
