// Finds the rows of assignments from the counts of all ranks and from places. The places that a
// rank receives lie in its GPU block. If there are too many for it, they lie in a scratch buffer of
// XLA's. Places for a GPU block are sent at once. Places for a scratch buffer are sent after the
// peer has cleared the buffer and posted its address.
#pragma once

#include "cuda/device/opening.cuh"
#include "cuda/device/waits.cuh"
#include "cuda/dispatch/groups.cuh"

namespace freeio::cuda {

__device__ inline int64_t num_assignments(const Exchange& x) {
  return static_cast<int64_t>(x.num_tokens) * x.top_k;
}

// This thread's first id of the chunk.
__device__ inline int first_id(const DispatchParams& p, const Chunk& chunk) {
  const int a = chunk.begin * p.exchange.top_k + static_cast<int>(threadIdx.x);
  return a < chunk.end * p.exchange.top_k ? p.topk_idx[a] : -1;
}

// Numbers the chunk's assignments to each expert, in order, from `next` on, and calls
// f(assignment, id, number), with id -1 where there is none. All threads, each one assignment at a
// time: first that of `id`, which was loaded before.
template <typename F>
__device__ void number_assignments(const DispatchParams& p, const Routing& routing,
                                   const Chunk& chunk, int id, const F& f) {
  const Exchange& x = p.exchange;
  const int end = chunk.end * x.top_k;
  for (int first = chunk.begin * x.top_k; first < end; first += kThreads) {
    const int a = first + static_cast<int>(threadIdx.x);
    const bool valid = id >= 0 && id < x.num_experts;
    const uint32_t same = __match_any_sync(kFullWarp, valid ? id : -1);
    const uint32_t earlier = __popc(same & ((1u << lane_id()) - 1));
    uint32_t number = earlier;
    // One warp after the other takes numbers.
    const int warps = min(kWarps, (end - first + kWarpSize - 1) / kWarpSize);
    for (int turn = 0; turn < warps; ++turn) {
      if (turn == warp_id()) {
        if (valid) number += routing.next[id];
        __syncwarp();
        if (valid && earlier == 0) routing.next[id] += __popc(same);
      }
      __syncthreads();
    }
    if (a < end) f(a, valid ? id : -1, number);
    id = a + kThreads < end ? p.topk_idx[a + kThreads] : -1;
  }
}

// What a rank knows of an assignment before it has the counts of the others: which of the
// receiver's experts it is for, and its number among the segment's assignments to that expert.
class Place {
 public:
  __device__ explicit Place(uint32_t word, const DispatchParams& p)
      : word_(word), bits_(p.place_bits) {}
  __device__ Place(int expert, uint32_t number, const DispatchParams& p)
      : word_(static_cast<uint32_t>(expert) << p.place_bits | (number + 1)), bits_(p.place_bits) {}
  // Of an assignment that is not the receiver's.
  static constexpr uint32_t kNone = 0;

  __device__ uint32_t word() const { return word_; }
  __device__ bool is_none() const { return word_ == kNone; }
  __device__ int expert() const { return static_cast<int>(word_ >> bits_); }
  __device__ uint32_t number() const { return (word_ & ((1u << bits_) - 1)) - 1; }

 private:
  uint32_t word_;
  int bits_;
};

// Where the places of this rank's assignments lie on the peer, and the peer's here.
__device__ inline Word* places_to(const DispatchParams& p, const CtaState& s, int rank) {
  const Exchange& x = p.exchange;
  return p.places_in_scratch ? s.buffer<Word>(rank, kScratch) + x.rank * num_assignments(x)
                             : inbox_to(x, rank).routes[turn(s, rank)];
}
__device__ inline const Word* places_from(const DispatchParams& p, const CtaState& s, int rank) {
  const Exchange& x = p.exchange;
  return p.places_in_scratch ? p.places + rank * num_assignments(x)
                             : inbox_from(x, rank).routes[turn(s, rank)];
}

// Marks the places in scratch that this CTA will read as "not arrived", as XLA's buffer may hold
// anything, words of an earlier call included. When all CTAs have done so, the peers learn where
// the buffer is. All threads.
__device__ inline void clear_places(const DispatchParams& p, const Chunk& chunk, CtaState& s) {
  const Exchange& x = p.exchange;
  if (x.num_ranks == 1) return;
  const int end = chunk.end * x.top_k;
  for (int rank = 0; rank < x.num_ranks; ++rank) {
    if (rank == x.rank) continue;
    Word* const words = p.places + rank * num_assignments(x);
    for (int a = chunk.begin * x.top_k + static_cast<int>(threadIdx.x); a < end; a += kThreads) {
      words[a] = 0;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 &&
      add_acquire_release_device(&self(x).num_prepared_ctas, 1) == gridDim.x - 1) {
    fence_system();
    post_address(x, s, kScratch);
  }
}

// Sends the places of the chunk's assignments, and leaves their numbers in the handle. All threads;
// `id` is the thread's first.
__device__ inline void send_places(const DispatchParams& p, const CtaState& s,
                                   const Routing& routing, const Chunk& chunk, int id) {
  const Exchange& x = p.exchange;
  number_assignments(p, routing, chunk, id, [&](int a, int its_id, uint32_t number) {
    const int dest = its_id < 0 ? -1 : x.local_experts.quotient(its_id);
    for (int rank = 0; rank < x.num_ranks; ++rank) {
      if (rank == x.rank) continue;
      const uint32_t place =
          rank == dest ? Place(x.local_experts.remainder(its_id), number, p).word() : Place::kNone;
      store_word(&places_to(p, s, rank)[a], make_word(s.epoch[rank], place));
    }
    p.dest_row[a] = static_cast<int>(number);
  });
}

// The row of an assignment, the `number`-th from `first` on; -1: it does not fit.
__device__ inline int row_or_none(const Exchange& x, uint32_t first, uint32_t number) {
  const uint32_t row = first + number;
  return row < static_cast<uint32_t>(x.capacity) ? static_cast<int>(row) : -1;
}

// Rows here of the tile's assignments, of all ranks, found from their places: [R, tokens, K] in
// shared memory; -1: none. This rank's own get their rows in the handle, too. False, for all
// threads: they did not come.
__device__ inline bool find_rows(const DispatchParams& p, CtaState& s, const Routing& routing,
                                 const Tile& tile, int* rows) {
  const Exchange& x = p.exchange;
  const int per_rank = tile.size() * x.top_k;
  for (int i = static_cast<int>(threadIdx.x); i < per_rank * x.num_ranks; i += kThreads) {
    const int rank = i / per_rank;
    const int a = tile.begin * x.top_k + i - rank * per_rank;
    int row = -1;
    if (rank == x.rank) {
      const int id = p.topk_idx[a];
      const auto number = static_cast<uint32_t>(p.dest_row[a]);
      if (id >= 0 && id < x.num_experts) row = row_or_none(x, routing.first[id], number);
      const int dest = row < 0 ? -1 : x.local_experts.quotient(id);
      p.dest_rank[a] = dest;
      p.dest_row[a] = row;
      if (dest != x.rank) row = -1;
    } else {
      const Word* address = &places_from(p, s, rank)[a];
      Word word = load_word(address);
      if (!wait_word(x, s, kWaitRoutes, rank, address, word)) break;
      if (const Place place(value_of(word), p); !place.is_none()) {
        const int expert = place.expert();
        const uint32_t earlier = routing.earlier[rank * (x.num_experts / x.num_ranks) + expert];
        row = row_or_none(x, routing.start[expert] + earlier, place.number());
      }
    }
    rows[i] = row;
  }
  return !__syncthreads_or(has_failed(s));
}

}  // namespace freeio::cuda
