// Routing by ids, for small calls. Each rank sends its ids to all others. Every CTA finds the rows
// of all ranks' assignments to its tokens by itself. This is more work for each CTA than routing by
// counts. But nothing is counted before the ids leave, so the rows can leave with them.
#pragma once

#include "cuda/device/waits.cuh"
#include "cuda/dispatch/groups.cuh"

namespace freeio::cuda {

// The ids of all ranks' assignments, in the order of packed rows, in dynamic shared memory.
struct AllIds {
  static constexpr int kNone = 0xffff;  // "no expert", also for invalid ids
  static constexpr int kPerLane = 8;    // ids that a lane looks at together

  uint16_t* ids;
  int per_rank;

  __device__ AllIds(void* memory, const Exchange& x)
      : ids(static_cast<uint16_t*>(memory)), per_rank(x.num_tokens * x.top_k) {}

  __device__ int words_per_rank() const { return (per_rank + 1) / 2; }

  // Two ids in one word. A rank with an odd number of ids leaves the last half empty.
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
    return bits_before(min(end, kPerLane)) & ~bits_before(max(begin, 0));
  }
  __device__ static uint32_t bits_before(int end) {
    return ((1u << (end + 1) / 2) - 1) | ((1u << end / 2) - 1) << 16;
  }

  // The highest bits of those halves of a word that are zero, among others.
  __device__ static uint32_t halves_without_bits(uint32_t word) {
    constexpr uint32_t kLow = 0x7fff7fffu;
    return ~(((word & kLow) + kLow) | word);
  }
};

// Of AllIds, in shared memory.
inline size_t all_ids_bytes(int assignments_of_all) {
  return sizeof(uint16_t) * (assignments_of_all + AllIds::kPerLane);
}

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
__device__ inline void send_ids(const DispatchParams& p, const CtaState& s, const AllIds& all,
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

// Takes the ids of the peers. All threads. The first threads take two words each, because the last
// ones have other words to wait for.
__device__ inline void receive_ids(const Exchange& x, CtaState& s, const AllIds& all) {
  constexpr int kBatch = 4;  // loads on their way together
  for (int i = 2 * static_cast<int>(threadIdx.x); i < all.words_per_rank(); i += 2 * kThreads) {
#pragma unroll 1
    for (int first = 0; first < x.num_ranks; first += kBatch) {
      WordPair words[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int rank = first + b;
        if (rank >= x.num_ranks || rank == x.rank) continue;
        words[b] = load_word_pair(&mailbox_from(x, s, rank).routing[i]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int rank = first + b;
        if (rank >= x.num_ranks || rank == x.rank) continue;
        const Word* const address = &mailbox_from(x, s, rank).routing[i];
        if (!wait_word(x, s, kWaitCounts, rank, address, words[b].first)) return;
        all.put(rank, i, value_of(words[b].first));
        if (i + 1 == all.words_per_rank()) continue;
        if (!wait_word(x, s, kWaitCounts, rank, address + 1, words[b].second)) return;
        all.put(rank, i + 1, value_of(words[b].second));
      }
    }
  }
}

// All threads; a barrier must follow.
__device__ inline void clear_counts(const Exchange& x, const Routing& routing) {
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.load[e] = routing.first[e] = 0;
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

// Finds rows of the tile's assignments. `rows`: those here of all ranks' assignments ([R, tokens,
// K] in shared memory; -1: none). The rows of this rank's own assignments go to the handle. Each
// warp looks at all assignments, one in each lane. The assignments whose rows are wanted are shared
// evenly among the warps. A warp counts equal ids for one of its lanes after the other.
__device__ inline void find_rows(const DispatchParams& p, const Routing& routing, const AllIds& all,
                                 const Tile& tile, int* rows) {
  const Exchange& x = p.exchange;
  const int tile_assignments = tile.size() * x.top_k;
  const int end = all.per_rank * x.num_ranks;
  // i is below 2^13, and i + 0.5 is far enough from a multiple that rounding does not matter.
  const float of_rank = 1.0f / static_cast<float>(tile_assignments);
  uint32_t wanted = warp_id();  // of all, modulo the number of warps, relative to this one
#pragma unroll 1
  for (int first = 0; first < tile_assignments * x.num_ranks; first += kWarpSize) {
    const int i = first + lane_id();
    const int rank = static_cast<int>((static_cast<float>(i) + 0.5f) * of_rank);
    const bool is_any = rank < x.num_ranks;
    const int a = tile.begin * x.top_k + i - rank * tile_assignments;
    const int position = rank * all.per_rank + a;
    const int id = is_any ? all.ids[position] : AllIds::kNone;
    int dest = id != AllIds::kNone ? x.local_experts.quotient(id) : -1;
    const bool has_row = dest == x.rank || (dest >= 0 && rank == x.rank);
    const uint32_t have_rows = __ballot_sync(kFullWarp, has_row);
    const uint32_t number = wanted + __popc(have_rows & ((1u << lane_id()) - 1));
    wanted += __popc(have_rows);
    const bool is_mine = (has_row ? number : first / kWarpSize + warp_id()) % kWarps == 0;
    uint32_t before = 0;
    uint32_t lanes = __ballot_sync(kFullWarp, has_row && is_mine);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      const int its_position = __shfl_sync(kFullWarp, position, lane);
      const int its_id = __shfl_sync(kFullWarp, id, lane);
      // It counts those before it, or those from it on and subtracts these from all.
      const bool is_early = 2 * its_position < end;
      const uint32_t some =
          all.count(is_early ? 0 : its_position, is_early ? its_position : end, its_id);
      if (lane_id() == lane) before = is_early ? some : routing.load[id] - some;
    }
    if (!is_any || !is_mine) continue;
    int row = -1;
    if (has_row) {
      const uint32_t place = routing.first[id] + before;
      const bool kept = place < static_cast<uint32_t>(x.capacity);
      row = kept ? static_cast<int>(place) : -1;
      dest = kept ? dest : -1;
    }
    rows[i] = dest == x.rank ? row : -1;
    if (rank == x.rank) {
      p.dest_rank[a] = dest;
      p.dest_row[a] = row;
    }
  }
  __syncthreads();
}

}  // namespace freeio::cuda
