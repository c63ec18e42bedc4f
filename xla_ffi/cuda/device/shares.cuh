// How the CTAs and warps of a kernel share the tokens and the work on them.
#pragma once

#include <climits>

#include "cuda/device/cta.cuh"
#include "cuda/params.h"

namespace freeio::cuda {

// Tokens [begin, end): the share of the `index`-th of `count` CTAs. Where shares cannot be equal,
// the last CTAs have one token more, because the first CTA has other things to do.
struct Chunk {
  int begin;
  int end;

  __device__ Chunk(int num_tokens, int index, int count) {
    const auto each = static_cast<int>(static_cast<uint32_t>(num_tokens) / count);
    const int first_of_more = count - (num_tokens - each * count);
    begin = index * each + max(index - first_of_more, 0);
    end = begin + each + (index >= first_of_more ? 1 : 0);
  }
  __device__ explicit Chunk(int num_tokens, const Team& team = Team::all())
      : Chunk(num_tokens, team.number, team.size) {}
  __device__ int size() const { return end - begin; }

  // The `index`-th of `count` shares of it.
  __device__ Chunk part(int index, int count) const {
    Chunk share(size(), index, count);
    share.begin += begin;
    share.end += begin;
    return share;
  }
};

// Which CTAs of a kernel send and which receive. While the stores of a CTA wait for the link, its
// loads and its accesses to shared memory queue up behind them. So some CTAs only send. Each chunk
// of a sender is the work of `kReceivers` receivers. This is the same on all ranks.
template <int kReceivers>
struct Teams {
  int senders;  // the last CTAs; 0: all CTAs do both

  __device__ bool has_senders() const { return senders > 0; }
  __device__ bool is_sender() const {
    return static_cast<int>(blockIdx.x) >= Team::all().size - senders;
  }
  __device__ bool is_left_over() const {
    return has_senders() && !is_sender() && own().number >= own().size;
  }
  __device__ Team own() const {
    const Team all = Team::all();
    if (!has_senders()) return all;
    return is_sender() ? Team{all.number - (all.size - senders), senders}
                       : Team{all.number, senders * kReceivers};
  }
  // This CTA's part of `units` units.
  __device__ Chunk chunk_of(int units) const {
    const Team team = own();
    if (!has_senders() || is_sender()) return Chunk(units, team);
    return Chunk(units, team.number / kReceivers, senders)
        .part(team.number % kReceivers, kReceivers);
  }
  // The n-th unit that this CTA sends of its chunk; at or beyond the chunk's end: none. The units
  // alternate among the receivers, so that all of them are busy.
  __device__ int sent_unit(const Chunk& chunk, int n) const {
    if (!has_senders()) return chunk.begin + n;
    const Chunk part = chunk.part(n % kReceivers, kReceivers);
    return n / kReceivers < part.size() ? part.begin + n / kReceivers : chunk.end;
  }
  // How many n there are.
  __device__ static int count_sent(const Chunk& chunk) {
    return (chunk.size() + kReceivers - 1) / kReceivers * kReceivers;
  }
};

// The part of a chunk whose routes fit in shared memory; mostly all of it.
struct Tile {
  int begin;
  int end;
  int number;
  int count;  // of the chunk's tiles, at least one

  __device__ int size() const { return end - begin; }
};

// Tiles of at most `tokens` tokens each.
struct Tiles {
  Chunk chunk;
  int tokens;
  int count;

  __device__ Tiles(const Chunk& whole, int tile_tokens)
      : chunk(whole),
        tokens(max(1, tile_tokens)),
        count(max(1, (whole.size() + tokens - 1) / tokens)) {}

  __device__ Tile operator[](int number) const {
    const int begin = chunk.begin + number * tokens;
    return {begin, min(begin + tokens, chunk.end), number, count};
  }

  // Calls f(tile) for each, all threads together. `warps` of them take items.
  template <typename F>
  __device__ void for_each(CtaState& s, int warps, const F& f) const {
    for (int number = 0; number < count; ++number) {
      if (threadIdx.x == 0) s.next_item = warps;
      f((*this)[number]);
      __syncthreads();
    }
  }
};

// A unit is a slice of a token. Either the tokens are shared out among the CTAs, each with all of
// its units. Or the units are shared out, so that several CTAs share a token where there are few
// tokens.
struct Units {
  const Divisor& per_token;
  Chunk chunk;

  __device__ Units(const Divisor& slices, int num_tokens, bool shares_tokens)
      : per_token(slices), chunk(shares_tokens ? num_tokens * size_of_token() : num_tokens) {
    if (shares_tokens) return;
    chunk.begin *= size_of_token();
    chunk.end *= size_of_token();
  }
  template <int kReceivers>
  __device__ Units(const Divisor& slices, int num_tokens, const Teams<kReceivers>& teams)
      : per_token(slices), chunk(teams.chunk_of(num_tokens * size_of_token())) {}

  __device__ int size_of_token() const { return static_cast<int>(per_token.divisor); }

  // The tokens of this CTA's units.
  __device__ Chunk tokens() const {
    Chunk tokens = chunk;
    tokens.begin = per_token.quotient(chunk.begin);
    tokens.end =
        chunk.size() == 0 ? tokens.begin : per_token.quotient(chunk.end + size_of_token() - 1);
    return tokens;
  }

  // This CTA's units of a tile's tokens.
  __device__ Chunk of(const Tile& tile) const {
    Chunk units = chunk;
    units.begin = max(units.begin, tile.begin * size_of_token());
    units.end = max(units.begin, min(units.end, tile.end * size_of_token()));
    return units;
  }
};

// The order in which a rank serves the ranks. It begins with the next rank, so that not all ranks
// begin with the same one. It serves itself last, so that the link has work at once.
__device__ inline int rank_of_turn(const Exchange& x, int turn) {
  const int rank = x.rank + 1 + turn;
  return rank < x.num_ranks ? rank : rank - x.num_ranks;
}

// The warp's next item of the tile's work. Warps take items in order; warp w begins with item w.
// The result is the same in all lanes. It is beyond all items once the exchange has failed.
__device__ inline int next_item(CtaState& s) {
  int item = INT_MAX;
  if (lane_id() == 0 && !has_failed(s)) item = static_cast<int>(atomicAdd(&s.next_item, 1u));
  return __shfl_sync(kFullWarp, item, 0);
}

}  // namespace freeio::cuda
