// Routing by ids, for calls with few assignments: each rank sends its ids to all others, and every
// CTA finds the rows of all ranks' assignments to its tokens by itself. One trip over the link less
// than routing by counts, for more work in each CTA. Where the rows themselves are sent, no further
// one follows.
#pragma once

#include "cuda/groups.cuh"

namespace freeio::cuda {

// The ids of all ranks' assignments, in the order of packed rows, in dynamic shared memory.
struct AllIds {
  static constexpr int kNone = 0xffff;  // "no expert", and ids that are none
  static constexpr int kPerLane = 8;    // ids that a lane looks at together

  uint16_t* ids;
  int per_rank;

  __device__ AllIds(void* memory, const Exchange& x)
      : ids(static_cast<uint16_t*>(memory)), per_rank(x.num_tokens * x.top_k) {}

  __device__ int words_per_rank() const { return (per_rank + 1) / 2; }

  // Two ids in one word. Whoever has an odd number of them leaves the last half empty.
  __device__ void put(int rank, int word, uint32_t value) const {
    uint16_t* pair = ids + rank * per_rank + 2 * word;
    pair[0] = static_cast<uint16_t>(value);
    if (2 * word + 1 < per_rank) pair[1] = static_cast<uint16_t>(value >> 16);
  }

  struct Some {
    uint16_t ids[kPerLane];
  };
  // From `first` on, a multiple of their number.
  __device__ Some load(int first) const {
    Some some;
    memcpy(&some, __builtin_assume_aligned(ids + first, sizeof(some)), sizeof(some));
    return some;
  }

  // Assignments to `id` in [begin, end). Whole warp.
  __device__ uint32_t count(int begin, int end, int id) const {
    const uint32_t twice = static_cast<uint32_t>(id) * 0x10001u;
    const int first = (begin / kPerLane + lane_id()) * kPerLane;
    uint32_t found = 0;
#pragma unroll 2
    for (int i = first; i < end; i += kWarpSize * kPerLane) {
      uint32_t pairs[kPerLane / 2];
      memcpy(pairs, __builtin_assume_aligned(ids + i, sizeof(pairs)), sizeof(pairs));
      uint32_t equal = 0;  // one bit for each
#pragma unroll
      for (int j = 0; j < kPerLane / 2; ++j) {
        equal |= halves_without_bits(pairs[j] ^ twice) >> (15 - j) & (0x10001u << j);
      }
      // Bit j: the id at i + 2 * j; bit 16 + j: the next one.
      if (i < begin || i + kPerLane > end) equal &= bits_within(begin - i, end - i);
      found += __popc(equal);
    }
    return __reduce_add_sync(kFullWarp, found);
  }

  // Of the bits above, those of the ids [begin, end) of the eight.
  __device__ static uint32_t bits_within(int begin, int end) {
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = max(begin, 0); n < min(end, kPerLane); ++n) bits |= 1u << (n / 2 + n % 2 * 16);
    return bits;
  }

  // The highest bits of those halves of a word that are zero, among others.
  __device__ static uint32_t halves_without_bits(uint32_t word) {
    constexpr uint32_t kLow = 0x7fff7fffu;
    return ~(((word & kLow) + kLow) | word);
  }
};

// Two of this rank's ids, which are sent in one word.
struct IdPair {
  int low;
  int high;

  __device__ IdPair(const DispatchParams& p, int word)
      : low(load(p, 2 * word)), high(load(p, 2 * word + 1)) {}
  __device__ static int load(const DispatchParams& p, int a) {
    return a < p.exchange.num_tokens * p.exchange.top_k ? p.topk_idx[a] : -1;
  }
};

// Takes this rank's ids, and sends this CTA's share of them to all peers. All threads of the team;
// `pair` are the ids of the thread's first word.
__device__ inline void send_ids(const DispatchParams& p, const Session& s, const AllIds& all,
                                const Team& team, IdPair pair) {
  const Exchange& x = p.exchange;
  const Chunk mine(all.words_per_rank(), team);
  int invalid = 0;
  const auto valid_or_none = [&](int id) {
    invalid += id < -1 || id >= x.num_experts;
    return static_cast<uint32_t>(id >= 0 && id < x.num_experts ? id : AllIds::kNone);
  };
#pragma unroll 1
  for (int word = static_cast<int>(threadIdx.x); word < all.words_per_rank(); word += kThreads) {
    const uint32_t value = valid_or_none(pair.high) << 16 | valid_or_none(pair.low);
    all.put(x.rank, word, value);
    const bool sends = mine.begin <= word && word < mine.end;
#pragma unroll 1
    for (int rank = 0; sends && rank < x.num_ranks; ++rank) {
      if (rank == x.rank) continue;
      store_word(&mailbox_to(x, s, rank).routing[word], make_word(s.epoch[rank], value));
    }
    pair = IdPair(p, word + kThreads);
  }
  if (blockIdx.x != 0) return;
  __shared__ int all_invalid;
  if (threadIdx.x == 0) all_invalid = 0;
  __syncthreads();
  if (invalid != 0) atomicAdd(&all_invalid, invalid);
  __syncthreads();
  if (threadIdx.x == 0) *p.num_invalid = all_invalid;
}

// All threads.
__device__ inline void receive_ids(const Exchange& x, Session& s, const AllIds& all) {
  constexpr int kBatch = 4;  // loads on their way together
  for (int i = static_cast<int>(threadIdx.x); i < all.words_per_rank(); i += kThreads) {
#pragma unroll 1
    for (int first = 0; first < x.num_ranks; first += kBatch) {
      Word words[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int rank = first + b;
        if (rank >= x.num_ranks || rank == x.rank) continue;
        words[b] = load_word(&mailbox_from(x, s, rank).routing[i]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int rank = first + b;
        if (rank >= x.num_ranks || rank == x.rank) continue;
        const Word* const address = &mailbox_from(x, s, rank).routing[i];
        if (!wait_word(x, s, kWaitCounts, rank, address, words[b])) return;
        all.put(rank, i, value_of(words[b]));
      }
    }
  }
}

// All threads; a barrier must follow.
__device__ inline void clear_counts(const Exchange& x, const Routing& routing) {
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.load[e] = routing.next[e] = 0;
  }
}

// The load of every expert; the first row of its group is found from it. All threads.
__device__ inline void count_ids(const Exchange& x, const Routing& routing, const AllIds& all) {
  const int end = all.per_rank * x.num_ranks;
  constexpr int kStep = kThreads * AllIds::kPerLane;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) * AllIds::kPerLane; first < end; first += kStep) {
    const AllIds::Some some = all.load(first);
#pragma unroll
    for (int i = 0; i < AllIds::kPerLane; ++i) {
      if (first + i < end && some.ids[i] != AllIds::kNone) {
        atomicAdd(&routing.load[some.ids[i]], 1u);
      }
    }
  }
  __syncthreads();
}

// Rows of the tile's assignments: of all ranks' that have one here, in `rows` ([R, tokens, K] in
// shared memory; -1: none), and of this rank's own, in the handle. The warps have them by turns,
// the lanes one each, and a warp counts for one of its lanes after the other.
__device__ inline void find_rows(const DispatchParams& p, const Routing& routing, const AllIds& all,
                                 const Tile& tile, int* rows) {
  const Exchange& x = p.exchange;
  const int tile_assignments = tile.size() * x.top_k;
  const int end = all.per_rank * x.num_ranks;
  int rank = 0;
  int rest = lane_id() * kWarps + warp_id();
#pragma unroll 1
  for (int i = rest; i - lane_id() * kWarps < tile_assignments * x.num_ranks; i += kThreads) {
    for (; rest >= tile_assignments && rank < x.num_ranks; ++rank) rest -= tile_assignments;
    const bool is_any = rank < x.num_ranks;
    const int a = tile.begin * x.top_k + rest;
    const int position = rank * all.per_rank + a;
    const int id = is_any ? all.ids[position] : AllIds::kNone;
    int dest = id != AllIds::kNone ? x.local_experts.quotient(id) : -1;
    const bool has_row = dest == x.rank || (dest >= 0 && rank == x.rank);
    uint32_t before = 0;
    for (uint32_t lanes = __ballot_sync(kFullWarp, has_row); lanes != 0; lanes &= lanes - 1) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      const int its_position = __shfl_sync(kFullWarp, position, lane);
      const int its_id = __shfl_sync(kFullWarp, id, lane);
      // Those before it, or all but those from it on.
      const bool is_early = 2 * its_position < end;
      const uint32_t some =
          all.count(is_early ? 0 : its_position, is_early ? its_position : end, its_id);
      if (lane_id() == lane) before = is_early ? some : routing.load[id] - some;
    }
    int row = -1;
    if (has_row) {
      const uint32_t place = routing.next[id] + before;
      const bool kept = place < static_cast<uint32_t>(x.capacity);
      row = kept ? static_cast<int>(place) : -1;
      dest = kept ? dest : -1;
    }
    if (is_any) rows[i] = dest == x.rank ? row : -1;
    if (is_any && rank == x.rank) {
      p.dest_rank[a] = dest;
      p.dest_row[a] = row;
    }
    rest += kThreads;
  }
  __syncthreads();
}

}  // namespace freeio::cuda
