// The routes that combine and its transpose follow: which rank and row each assignment has, and its
// weight.
#pragma once

#include "cuda/device/shares.cuh"

namespace freeio::cuda {

// Addresses of the routes, where they are read from the peers' handles.
constexpr uint32_t kRouteSlots = 1u << kDestRank | 1u << kDestRow | 1u << kWeights;

// The routes of one token, in the lanes of a warp: lane k has assignment k.
template <typename Accumulator>
struct TokenRoutes {
  int rank = -1;  // -1: no row
  int row = -1;
  Accumulator weight = 1;

  // Lanes whose row is on `where`.
  __device__ uint32_t on(int where) const { return __ballot_sync(kFullWarp, rank == where); }
};

// A row and its rank in one word.
class SentRoute {
 public:
  __device__ explicit SentRoute(uint32_t word) : word_(word) {}
  __device__ SentRoute(int rank, int row)
      : word_(rank < 0
                  ? 0
                  : static_cast<uint32_t>(rank + 1) * kMaxSentRow + static_cast<uint32_t>(row)) {}
  __device__ uint32_t word() const { return word_; }
  __device__ int rank() const { return static_cast<int>(word_ / kMaxSentRow) - 1; }
  __device__ int row() const {
    return word_ < kMaxSentRow ? -1 : static_cast<int>(word_ % kMaxSentRow);
  }

 private:
  uint32_t word_;
};

// Weights are sent where they have 32 bits.
template <typename Accumulator>
__device__ Accumulator weight_of(uint32_t word) {
  return static_cast<Accumulator>(__uint_as_float(word));
}

// One of this rank's assignments, as it is sent to the peers.
struct SentAssignment {
  int rank = -1;
  int row = -1;
  uint32_t weight = 0;

  __device__ SentAssignment(int a, int end, const int32_t* dest_rank, const int32_t* dest_row,
                            const void* weights) {
    if (a >= end) return;
    rank = dest_rank[a];
    row = dest_row[a];
    if (weights != nullptr) weight = static_cast<const uint32_t*>(weights)[a];
  }
};

// Sends the routes of this rank's assignments `mine` to all peers. Weights go only to the peer that
// has the row; where there are none, all are ones. All threads; `first` is the thread's first
// assignment.
__device__ inline void send_routes(const Exchange& x, const CtaState& s, const Chunk& mine,
                                   SentAssignment first, const int32_t* dest_rank,
                                   const int32_t* dest_row, const void* weights) {
  const int assignments = x.num_tokens * x.top_k;
  for (int a = mine.begin + static_cast<int>(threadIdx.x); a < mine.end; a += kThreads) {
    const uint32_t route = SentRoute(first.rank, first.row).word();
    for (int rank = 0; rank < x.num_ranks; ++rank) {
      if (rank == x.rank) continue;
      Word* words = inbox_to(x, rank).routes[turn(s, rank)];
      store_word(&words[a], make_word(s.epoch[rank], route));
      if (weights != nullptr && rank == first.rank) {
        store_word(&words[assignments + a], make_word(s.epoch[rank], first.weight));
      }
    }
    first = SentAssignment(a + kThreads, mine.end, dest_rank, dest_row, weights);
  }
}

// Assignments whose routes have room in so many bytes of shared memory.
template <typename Accumulator>
__host__ __device__ constexpr int tile_assignments(int bytes) {
  return bytes / static_cast<int>(2 * sizeof(int) + sizeof(Accumulator));
}

// The routes of a tile's tokens, of all ranks: [R, tokens, K] in shared memory.
template <typename Accumulator>
struct RouteTile {
  Accumulator* weights;
  int* ranks;
  int* rows;
  int num_ranks = 0;
  int per_rank = 0;  // assignments
  int top_k = 0;

  __device__ RouteTile(void* memory, int capacity)
      : weights(static_cast<Accumulator*>(memory)),
        ranks(reinterpret_cast<int*>(weights + capacity)),
        rows(ranks + capacity) {}

  __device__ void begin(const Exchange& x, const Tile& tile) {
    num_ranks = x.num_ranks;
    top_k = x.top_k;
    per_rank = tile.size() * top_k;
  }

  // Gets the routes, sent or not. It may fail if they are sent. All threads; a barrier must follow.
  __device__ void take(const Exchange& x, CtaState& s, const Tile& tile, const int32_t* dest_rank,
                       const int32_t* dest_row, const void* weight, bool are_sent) {
    if (are_sent) {
      receive(x, s, tile, dest_rank, dest_row, weight, true);
    } else {
      fetch(x, s, tile, dest_rank, dest_row, weight);
    }
  }

  // Reads the routes from the handles, those of peers over the link. All threads; a barrier must
  // follow.
  __device__ void fetch(const Exchange& x, const CtaState& s, const Tile& tile,
                        const int32_t* dest_rank, const int32_t* dest_row, const void* weight) {
    const int64_t begin = static_cast<int64_t>(tile.begin) * top_k;
    for (int i = static_cast<int>(threadIdx.x); i < size(); i += kThreads) {
      const int rank = rank_of(i);
      const int64_t a = begin + i % per_rank;
      const bool own = rank == x.rank;
      const auto* weight_array = own ? static_cast<const Accumulator*>(weight)
                                     : s.buffer<const Accumulator>(rank, kWeights);
      ranks[i] = own ? dest_rank[a] : s.buffer<int32_t>(rank, kDestRank)[a];
      rows[i] = own ? dest_row[a] : s.buffer<int32_t>(rank, kDestRow)[a];
      weights[i] = weight != nullptr ? weight_array[a] : Accumulator{1};
    }
  }

  // Takes the routes that the peers sent (send_routes()); without `peers`, only this rank's own.
  // All threads; a barrier must follow.
  __device__ void receive(const Exchange& x, CtaState& s, const Tile& tile,
                          const int32_t* dest_rank, const int32_t* dest_row, const void* weight,
                          bool peers) {
    const int begin = tile.begin * top_k;
    const int weights_at = x.num_tokens * top_k;
    for (int i = static_cast<int>(threadIdx.x); i < size(); i += kThreads) {
      const int rank = rank_of(i);
      const int a = begin + i % per_rank;
      // All loads are on their way before one is waited for.
      const Word* words = inbox_from(x, rank).routes[turn(s, rank)];
      const bool own = rank == x.rank;
      if (!own && !peers) continue;
      const int own_rank = own ? dest_rank[a] : -1;
      const int own_row = own ? dest_row[a] : -1;
      const Accumulator own_weight =
          own && weight != nullptr ? static_cast<const Accumulator*>(weight)[a] : Accumulator{1};
      Word route = own ? 0 : load_word(&words[a]);
      Word its_weight = own || weight == nullptr ? 0 : load_word(&words[weights_at + a]);
      ranks[i] = own_rank;
      rows[i] = own_row;
      weights[i] = own_weight;
      if (own) continue;
      if (!wait_word(x, s, kWaitRoutes, rank, &words[a], route)) break;
      const SentRoute sent(value_of(route));
      ranks[i] = sent.rank();
      rows[i] = sent.row();
      if (weight == nullptr || sent.rank() != x.rank) continue;
      if (!wait_word(x, s, kWaitRoutes, rank, &words[weights_at + a], its_weight)) break;
      weights[i] = weight_of<Accumulator>(value_of(its_weight));
    }
  }
  __device__ int size() const { return per_rank * num_ranks; }
  __device__ int rank_of(int i) const { return i / per_rank; }
  __device__ int first_of(int rank, int tile_token) const {
    return rank * per_rank + tile_token * top_k;
  }
  __device__ TokenRoutes<Accumulator> of(int rank, int tile_token) const {
    TokenRoutes<Accumulator> routes;
    if (lane_id() < top_k) {
      const int i = first_of(rank, tile_token) + lane_id();
      routes.rank = ranks[i];
      routes.row = rows[i];
      routes.weight = weights[i];
    }
    return routes;
  }
};

}  // namespace freeio::cuda
