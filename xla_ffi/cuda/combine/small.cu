// combine of small calls, whose time is mostly latency. As in large.cu, but partial sums go to the
// token's rank in lines (lines.cuh), into its GPU block, and no rank waits for the end of another.
//
// A warp loads all rows of a sum into its registers at once. It has so few slices that there is
// nothing to prepare while it waits, and preparing would take more instructions.
#include "cuda/device/elements.cuh"
#include "cuda/device/end.cuh"
#include "cuda/device/lines.cuh"
#include "cuda/device/opening.cuh"
#include "cuda/device/rank_set.cuh"
#include "cuda/device/routes.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/geometry.h"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

constexpr int kTileAssignments = 2048;  // of all ranks, whose routes are in shared memory
constexpr int kColumns = 2;             // accesses of one lane to a slice
constexpr int kRowsTogether = 4;        // that a warp waits for at once
// How many times a waiting warp loads whole lines, so that it has them in registers as soon as they
// come. After that it polls only their flags, and looks at the clock.
constexpr int kEagerPolls = 32;
static_assert(kMaxRanks * kMaxTopK <= kTileAssignments, "those of one token fit");

// A tile's work, as one warp does it.
template <typename Element>
struct SendingWarp {
  static constexpr int kCount = kSentAccess / static_cast<int>(sizeof(Element));
  using Accumulator = typename Element::Accumulator;
  using Sums = Accumulator[kColumns][kCount];

  // One slice of a token.
  struct SumSlice {
    int unit;
    int token;
    int begin;  // in the row
    int end;

    __device__ SumSlice(const CombineParams& p, int number)
        : unit(number), token(p.slices.quotient(unit)) {
      begin = (unit - token * p.num_slices) * p.slice_width;
      end = min(begin + p.slice_width, p.width);
    }
    // Where the lane's elements begin; at or beyond `end`: it has none.
    __device__ int column(int c) const { return begin + LineSlice::place(c) * kCount; }
  };

  const CombineParams& p;
  const Exchange& x;
  CtaState& s;
  const RouteTile<Accumulator>& routes;
  const Tile& tile;
  const Chunk units;

  // A warp first sends everything that goes to the peers, and then takes what comes from them. So
  // it never waits before it has sent what others wait for.
  __device__ void run(bool sends, bool sums) const {
    const int sent = sends ? units.size() * (x.num_ranks - 1) : 0;
    const int items = sent + (sums ? units.size() : 0);
    for (int item = warp_id(); item < items; item = next_item(s)) {
      const bool is_sent = item < sent;
      const int rank = is_sent ? rank_of_turn(x, p.peers.remainder(item)) : x.rank;
      const SumSlice slice(p, units.begin + (is_sent ? p.peers.quotient(item) : item - sent));
      const auto of_token = routes.of(rank, slice.token - tile.begin);
      if (is_sent && of_token.on(x.rank) == 0) continue;
      const LineSlice partial = sum_of_rows(of_token, slice);
      if (is_sent) {
        partial.send(slices_to(x, s, rank)[slice.unit], s.epoch[rank]);
      } else {
        store_sum(of_token, slice, partial);
      }
    }
  }

 private:
  // Of the token's rows here, weighted.
  __device__ LineSlice sum_of_rows(const TokenRoutes<Accumulator>& of_token,
                                   const SumSlice& slice) const {
    const auto* const all_rows = static_cast<const Element*>(p.expert_out);
    Sums sums = {};
    for (uint32_t rest = of_token.on(x.rank); rest != 0;) {
      uint4 rows[kRowsTogether][kColumns] = {};
      uint32_t ahead = rest;
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i, ahead &= ahead - 1) {
        if (ahead == 0) break;
        const int row = __shfl_sync(kFullWarp, of_token.row, first_of(ahead));
        const Element* const from = all_rows + int64_t{row} * p.width;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = slice.column(c);
          if (column < slice.end) rows[i][c] = load_raw<Element, kCount>(from + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i, rest &= rest - 1) {
        if (rest == 0) break;
        const Accumulator weight = __shfl_sync(kFullWarp, of_token.weight, first_of(rest));
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          add_weighted<Element, kCount>(weight, rows[i][c], sums[c]);
        }
      }
    }
    LineSlice rounded;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) rounded.accesses[c] = round(sums[c]);
    return rounded;
  }

  // All partial sums of one of this rank's tokens, its own among them, in order of rank.
  __device__ void store_sum(const TokenRoutes<Accumulator>& of_token, const SumSlice& slice,
                            const LineSlice& own) const {
    const RankSet ranks = union_of_lanes(of_token.rank >= 0 ? set_of(of_token.rank) : 0);
    Sums sums = {};
    add_all(ranks & ~set_of(x.rank), slice.unit, own, sums);
    Element* const row = static_cast<Element*>(p.sums) + int64_t{slice.token} * p.width;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = slice.column(c);
      if (column < slice.end) store_raw<Element, kCount>(row + column, round(sums[c]));
    }
  }

  // The partial sums that the peers in `ranks` send, and this rank's own where its turn is.
  __device__ void add_all(RankSet ranks, int unit, const LineSlice& own, Sums& sums) const {
    bool has_own = false;
    while (ranks != 0) {
      LineSlice slices[kSlicesTogether];
      for (int polls = 0; !load_sent(ranks, unit, slices); ++polls) {
        if (polls < kEagerPolls) continue;
        RankSet from = ranks;
        for (int i = 0; i < slice_of_lane(); ++i) from &= from - 1;
        const int rank = first_rank(from);
        const SentSlice* const sent = from == 0 ? nullptr : &slices_from(x, s, rank)[unit];
        if (!wait_for_lines(x, s, kWaitPartialSums, rank, sent)) return;
      }
#pragma unroll
      for (int i = 0; i < kSlicesTogether; ++i, ranks &= ranks - 1) {
        if (ranks == 0) break;
        if (!has_own && first_rank(ranks) > x.rank) {
          add_one(own, sums);
          has_own = true;
        }
        slices[i].take();
        add_one(slices[i], sums);
      }
    }
    if (!has_own) add_one(own, sums);
  }

  // Loads the partial sums of the first ranks, as many as fit. Returns whether they have arrived.
  __device__ bool load_sent(RankSet ranks, int unit, LineSlice (&slices)[kSlicesTogether]) const {
    RankSet rest = ranks;
#pragma unroll
    for (int i = 0; i < kSlicesTogether; ++i, rest &= rest - 1) {
      if (rest != 0) slices[i].start(slices_from(x, s, first_rank(rest))[unit]);
    }
    bool here = true;
#pragma unroll
    for (int i = 0; i < kSlicesTogether; ++i, ranks &= ranks - 1) {
      if (ranks != 0) here &= slices[i].is_here(s.epoch[first_rank(ranks)]);
    }
    return __all_sync(kFullWarp, here);
  }

  __device__ static void add_one(const LineSlice& slice, Sums& sums) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) add<Element, kCount>(slice.accesses[c], sums[c]);
  }
  __device__ static uint4 round(const Accumulator (&sums)[kCount]) {
    return round_to<Element, kCount>(sums);
  }
  __device__ static int first_of(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
};

template <typename Element>
__device__ void exchange(const CombineParams& p, CtaState& s, void* shared_memory) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Teams<kCombineReceivers> teams{p.senders};
  const bool sends = !teams.has_senders() || teams.is_sender();
  const bool sums = !teams.has_senders() || !teams.is_sender();
  const Units units(p.slices, x.num_tokens, teams);
  // These loads need no peer, so they run while the exchange opens.
  const Chunk sent(x.num_tokens * x.top_k);
  const SentAssignment first(sent.begin + static_cast<int>(threadIdx.x), sent.end, p.dest_rank,
                             p.dest_row, p.weights);
  if (!open(x, s, opening)) return;
  begin_alone(x);
  enter(s, kRouting);
  send_routes(x, s, sent, first, p.dest_rank, p.dest_row, p.weights);
  if (blockIdx.x == 0) post(x, s, 0);
  if (teams.is_left_over()) return;
  RouteTile<typename Element::Accumulator> routes(shared_memory, kTileAssignments);
  const Tiles tiles(units.tokens(), kTileAssignments / (x.num_ranks * x.top_k));
  bool ready = true;
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    if (!ready) return;
    enter(s, kAgreeing);
    routes.begin(x, tile);
    // A CTA that only sums needs no routes of peers.
    routes.receive(x, s, tile, p.dest_rank, p.dest_row, p.weights, sends);
    ready = tile.number == 0 ? receive_addresses(x, s, 0) : !__syncthreads_or(has_failed(s));
    if (!ready) return;
    enter(s, kMoving);
    SendingWarp<Element>{p, x, s, routes, tile, units.of(tile)}.run(sends, sums);
  });
  finish_alone(x, s);
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    combine_small_kernel(const __grid_constant__ CombineParams p) {
  __shared__ CtaState s;
  exchange<Element>(p, s, dynamic_shared_memory<void>());
  leave(p.exchange, s, [&](const Team& spoilers) {
    const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(Element));
    spoil(spoilers, p.sums, p.exchange.num_tokens * row_bytes);
  });
}

}  // namespace

Kernel combine_small(DType dtype) {
  Kernel kernel;
  kernel.shared_bytes = kTileAssignments * (2 * sizeof(int) + sizeof(float));
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    // 16 bytes of one-byte elements would need more sums than fit in registers.
    if constexpr (sizeof(Element) == 2 || sizeof(Element) == 4) {
      kernel.function = reinterpret_cast<const void*>(&combine_small_kernel<Element>);
    }
  });
  return kernel;
}

}  // namespace freeio::cuda
