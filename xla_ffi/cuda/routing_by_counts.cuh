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

// Some of this rank's ids, four at a time.
struct IdQuads {
  static constexpr int kCount = 8;
  static constexpr int kStep = kCount * kThreads;  // quads
  int4 ids[kCount];

  __device__ IdQuads(const DispatchParams& p, int first) {
    const auto* quads = reinterpret_cast<const int4*>(p.topk_idx);
    const int end = p.exchange.num_tokens * p.exchange.top_k / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (const int quad = first + i * kThreads; quad < end) ids[i] = quads[quad];
    }
  }
};

// Every CTA counts all of this rank's assignments: cheaper than a barrier of the grid up to 10^5.
__device__ inline void count(const DispatchParams& p, const Routing& routing, const Chunk& chunk,
                             IdQuads quads) {
  const Exchange& x = p.exchange;
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.before[e] = routing.count[e] = 0;
  }
  __shared__ int all_invalid;
  if (threadIdx.x == 0) all_invalid = 0;
  __syncthreads();
  const int assignments = x.num_tokens * x.top_k;
  const int num_quads = assignments / 4;
  const int begin = chunk.begin * x.top_k;
  int invalid = 0;
  for (int first = static_cast<int>(threadIdx.x); first < num_quads; first += IdQuads::kStep) {
    const IdQuads next(p, first + IdQuads::kStep);
#pragma unroll
    for (int i = 0; i < IdQuads::kCount; ++i) {
      const int quad = first + i * kThreads;
      if (quad >= num_quads) break;
      count_one(x, routing, quads.ids[i].x, quad * 4 < begin, invalid);
      count_one(x, routing, quads.ids[i].y, quad * 4 + 1 < begin, invalid);
      count_one(x, routing, quads.ids[i].z, quad * 4 + 2 < begin, invalid);
      count_one(x, routing, quads.ids[i].w, quad * 4 + 3 < begin, invalid);
    }
    quads = next;
  }
  const int rest = num_quads * 4 + static_cast<int>(threadIdx.x);
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
    store_word(&mailbox_to(x, s, rank).routing[e],
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
          words[i] = load_word(&mailbox_from(x, s, rank).routing[e]);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = first + i;
        if (rank >= x.num_ranks || rank == x.rank) continue;
        const Word* address = &mailbox_from(x, s, rank).routing[e];
        if (!wait_word(x, s, kWaitCounts, rank, address, words[i])) break;
        load += value_of(words[i]);
        if (rank < x.rank) earlier += value_of(words[i]);
      }
    }
    routing.load[e] = load;
    routing.next[e] = earlier;
  }
}

// This thread's first id of the chunk.
__device__ inline int first_id(const DispatchParams& p, const Chunk& chunk) {
  const int a = chunk.begin * p.exchange.top_k + static_cast<int>(threadIdx.x);
  return a < chunk.end * p.exchange.top_k ? p.topk_idx[a] : -1;
}

// Gives the chunk's assignments their rows, in order, and tells the ranks. All threads, each one
// assignment at a time: first that of `id`, which was loaded before the counts were waited for.
__device__ inline void assign_rows(const DispatchParams& p, const Session& s,
                                   const Routing& routing, const Chunk& chunk, int id) {
  const Exchange& x = p.exchange;
  const int64_t num_assignments = static_cast<int64_t>(x.num_tokens) * x.top_k;
  const int end = chunk.end * x.top_k;
  for (int first = chunk.begin * x.top_k; first < end; first += kThreads) {
    const int a = first + static_cast<int>(threadIdx.x);
    const bool valid = id >= 0 && id < x.num_experts;
    const uint32_t same = __match_any_sync(kFullWarp, valid ? id : -1);
    const uint32_t earlier = __popc(same & ((1u << lane_id()) - 1));
    uint32_t row = earlier;
    // One warp after the other takes rows of the experts' next ones.
    const int warps = min(kWarps, (end - first + kWarpSize - 1) / kWarpSize);
    for (int turn = 0; turn < warps; ++turn) {
      if (turn == warp_id()) {
        if (valid) row += routing.next[id];
        __syncwarp();
        if (valid && earlier == 0) routing.next[id] += __popc(same);
      }
      __syncthreads();
    }
    if (a < end) {
      const bool kept = valid && row < static_cast<uint32_t>(x.capacity);
      const int dest = kept ? x.local_experts.quotient(id) : -1;
      for (int rank = 0; rank < x.num_ranks; ++rank) {
        if (rank == x.rank) continue;
        store_word(s.buffer<Word>(rank, kScratch) + x.rank * num_assignments + a,
                   make_word(s.epoch[rank], dest == rank ? row + 1 : 0));
      }
      p.dest_rank[a] = dest;
      p.dest_row[a] = kept ? static_cast<int>(row) : -1;
    }
    id = a + kThreads < end ? p.topk_idx[a + kThreads] : -1;
  }
}

}  // namespace freeio::cuda
