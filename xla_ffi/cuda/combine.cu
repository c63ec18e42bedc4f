// combine: expert outputs back to their tokens.
//
// Each rank sums a token's rows that it hosts, weighted, and stores that partial sum to a slot that
// the token's own rank keeps for it: one row crosses per (token, rank) pair. The token's rank adds
// the partial sums in order of rank, its own among them, straight from its rows.
#include "cuda/elements.cuh"
#include "cuda/geometry.h"
#include "cuda/kernels.h"
#include "cuda/session.cuh"
#include "cuda/shared_memory.cuh"

namespace freeio::cuda {
namespace {

constexpr int kAhead = kWarps;          // slices by which pushing is ahead of summing
constexpr int kTileAssignments = 4096;  // of all ranks, whose routes are in shared memory

// Slot of `rank` among the ranks, other than the token's own, that have its rows.
__device__ int slot_of(int rank, uint32_t ranks, int own_rank) {
  return __popc(ranks & ~(1u << own_rank) & ((1u << rank) - 1));
}

template <typename Element, int kCount>
struct Combine {
  using Accumulator = typename Element::Accumulator;
  using Routes = TokenRoutes<Accumulator>;
  using R = Raw<Element, kCount>;
  static constexpr int kBatch = 2;    // rows in flight together: more do not fit in registers
  static constexpr int kColumns = 4;  // accesses of one lane to a row in flight together
  static constexpr int kStep = kWarpSize * kCount;

  const CombineParams& p;
  const Exchange& x;
  Session& s;
  const RouteTile<Accumulator>& routes_of;
  const Tile& tile;

  __device__ int64_t slot_index(int token, int slot) const {
    return static_cast<int64_t>(token) * p.num_slots + slot;
  }

  // This rank's rows in `mask`, weighted and summed in order of k. Whole warp.
  __device__ void sum_rows(const Routes& routes, uint32_t mask, int first, int end,
                           Accumulator (&sums)[kColumns][kCount]) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[c][j] = 0;
    }
    while (mask != 0) {
      R rows[kBatch][kColumns];
      Accumulator weights[kBatch];
      const int count = __popc(mask);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = i < count ? __ffs(static_cast<int>(mask)) - 1 : 0;
        mask &= mask - 1;
        const int64_t row = __shfl_sync(kFullWarp, routes.row, k);
        weights[i] = __shfl_sync(kFullWarp, routes.weight, k);
        const Element* from = static_cast<const Element*>(p.expert_out) + row * p.width + first;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (i < count && first + c * kStep < end) {
            rows[i][c] = load_raw<Element, kCount>(from + c * kStep);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          Accumulator values[kCount];
          widen<Element, kCount>(rows[i][c], values);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            if constexpr (sizeof(Element) < sizeof(float)) {
              sums[c][j] = fma(weights[i], values[j], sums[c][j]);
            } else {
              sums[c][j] += weights[i] * values[j];  // rounds twice, as on the CPU
            }
          }
        }
      }
    }
  }

  __device__ void store_sums(Element* row, int first, int end,
                             const Accumulator (&sums)[kColumns][kCount]) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (first + c * kStep >= end) continue;
      store_raw<Element, kCount>(row + first + c * kStep, round_to<Element, kCount>(sums[c]));
    }
  }

  // Calls f(first, end) for each pass over the slice: this lane's first column, and the end.
  template <typename F>
  __device__ void for_passes(int slice, const F& f) const {
    const int begin = slice * p.slice_width;
    const int end = min(begin + p.slice_width, p.width);
    for (int pass = begin; pass < end; pass += kColumns * kStep) {
      f(pass + lane_id() * kCount, end);
    }
  }

  // This rank's partial sum of a peer's token, to the peer.
  __device__ void push(int rank, int token, int slice) const {
    const Routes routes = routes_of.of(rank, token - tile.begin);
    const uint32_t mask = routes.on(x.rank);
    if (mask == 0) return;
    const int64_t slot = slot_index(token, slot_of(x.rank, routes.ranks(), rank));
    Element* target = s.buffer<Element>(rank, kScratch) + slot * p.width;
    for_passes(slice, [&](int first, int end) {
      Accumulator sums[kColumns][kCount];
      sum_rows(routes, mask, first, end, sums);
      store_sums(target, first, end, sums);
    });
    __syncwarp();
    if (lane_id() != 0) return;
    // Partner: the load in has_arrived() on the peer.
    if (p.sends_routes) {
      uint32_t* arrived = x.control[rank]->arrived[x.gpu[x.rank]];
      store_release_system(&arrived[token * p.num_slices + slice], s.epoch[rank]);
    } else {
      store_release_system(s.buffer<uint32_t>(rank, kFlags) + slot * p.num_slices + slice, 1);
    }
  }

  // Whether `rank` has stored its partial sum in that slot.
  __device__ bool has_arrived(int rank, int token, int64_t slot, int slice) const {
    // Partner: the store in push() on the peer.
    if (p.sends_routes) {
      // A peer may be in its next exchange already, and have stored that one's epoch.
      const uint32_t* arrived = self(x).arrived[x.gpu[rank]];
      const uint32_t epoch = load_acquire_system(&arrived[token * p.num_slices + slice]);
      return static_cast<int32_t>(epoch - s.epoch[rank]) >= 0;
    }
    return load_acquire_system(p.flags + slot * p.num_slices + slice) != 0;
  }

  // Waits for the partial sums of one of this rank's tokens. Whole warp.
  __device__ void wait_for_partial_sums(uint32_t ranks, int token, int slice) const {
    if (const int rank = lane_id(); rank != x.rank && (ranks >> rank & 1) != 0) {
      const int64_t slot = slot_index(token, slot_of(rank, ranks, x.rank));
      wait_until(x, s, kWaitPartialSums, rank,
                 [&] { return has_arrived(rank, token, slot, slice); });
    }
    __syncwarp();
  }

  // Adds the partial sums of the peers in `ranks`, in order, to the totals.
  __device__ void add_slots(uint32_t ranks, uint32_t all_ranks, int token, int first, int end,
                            Accumulator (&totals)[kColumns][kCount]) const {
    const Element* slots =
        static_cast<const Element*>(p.partial_sums) + slot_index(token, 0) * p.width + first;
    while (ranks != 0) {
      R partials[kBatch][kColumns];
      const int count = __popc(ranks);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = i < count ? __ffs(static_cast<int>(ranks)) - 1 : 0;
        ranks &= ranks - 1;
        const Element* slot = slots + slot_of(rank, all_ranks, x.rank) * int64_t{p.width};
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (i < count && first + c * kStep < end) {
            partials[i][c] = load_raw<Element, kCount>(slot + c * kStep);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) add(partials[i][c], totals[c]);
      }
    }
  }

  __device__ void add(const R& raw, Accumulator (&totals)[kCount]) const {
    Accumulator values[kCount];
    widen<Element, kCount>(raw, values);
#pragma unroll
    for (int j = 0; j < kCount; ++j) totals[j] += values[j];
  }

  // All partial sums of one of this rank's tokens, in order of rank: the lower ranks', its own,
  // which it makes before it waits for theirs, and the higher ranks'.
  __device__ void sum(int token, int slice) const {
    const Routes routes = routes_of.of(x.rank, token - tile.begin);
    const uint32_t mask = routes.on(x.rank);
    const uint32_t ranks = routes.ranks();
    const uint32_t lower = (1u << x.rank) - 1;
    bool waited = false;
    for_passes(slice, [&](int first, int end) {
      Accumulator sums[kColumns][kCount];
      R own[kColumns];
      sum_rows(routes, mask, first, end, sums);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        own[c] = round_to<Element, kCount>(sums[c]);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums[c][j] = 0;
      }
      if (!waited) wait_for_partial_sums(ranks, token, slice);
      waited = true;
      add_slots(ranks & lower, ranks, token, first, end, sums);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) add(own[c], sums[c]);
      add_slots(ranks & ~lower & ~(1u << x.rank), ranks, token, first, end, sums);
      store_sums(static_cast<Element*>(p.sums) + static_cast<int64_t>(token) * p.width, first, end,
                 sums);
    });
  }

  // Pushes for every peer and, kAhead slices behind, the sums. A sum waits only for pushes that
  // come before it in the peers' order, so waiting warps never hold up what they wait for.
  __device__ void run() const {
    const int slices = tile.size() * p.num_slices;
    const int items = slices == 0 ? 0 : (slices + kAhead) * x.num_ranks;
    for (int item = warp_id(); item < items; item = next_item(s)) {
      const int turn = item % x.num_ranks;
      const bool pushes = turn != x.num_ranks - 1;
      const int unit = item / x.num_ranks - (pushes ? 0 : kAhead);
      if (unit < 0 || unit >= slices) continue;
      const int token = tile.begin + unit / p.num_slices;
      const int slice = unit % p.num_slices;
      if (pushes) {
        push((x.rank + 1 + turn) % x.num_ranks, token, slice);
      } else {
        sum(token, slice);
      }
    }
  }
};

// Arrival flags start at zero; then the peers learn where everything is. Each CTA clears those that
// it is to read itself: it waits for no other CTA before it does.
__device__ void prepare_slots(const CombineParams& p, const Chunk& chunk, Session& s) {
  const Exchange& x = p.exchange;
  if (x.num_ranks == 1 || p.sends_routes) return;
  const int64_t of_token = static_cast<int64_t>(p.num_slots) * p.num_slices;
  for (int64_t i = chunk.begin * of_token + threadIdx.x; i < chunk.end * of_token; i += kThreads) {
    p.flags[i] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0 && add_acquire_release_device(&self(x).prepared, 1) == gridDim.x - 1) {
    fence_system();
    post_address(x, s, kScratch);
    post_address(x, s, kFlags);
  }
}

// CTA 0.
__device__ void post_buffers(const CombineParams& p, const Session& s) {
  const Exchange& x = p.exchange;
  post_signature(x, s);
  if (p.sends_routes) {
    if (threadIdx.x == 0) post_address(x, s, kScratch);
    send_routes(x, s, p.dest_rank, p.dest_row, p.weights);
  } else if (threadIdx.x == 0) {
    post_address(x, s, kDestRank);
    post_address(x, s, kDestRow);
    post_address(x, s, kWeights);
  }
}

// The routes of the tile, and at the first one where the peers' slots are. False, for all threads:
// they did not come.
template <typename Accumulator>
__device__ bool receive_routes(const CombineParams& p, Session& s, const Tile& tile,
                               RouteTile<Accumulator>& routes) {
  const Exchange& x = p.exchange;
  routes.begin(x, tile, 0, x.num_ranks);
  if (p.sends_routes) {
    routes.receive(x, s, tile, p.dest_rank, p.dest_row, p.weights);
    return !__syncthreads_or(has_failed(s));
  }
  routes.fetch(x, s, tile, p.dest_rank, p.dest_row, p.weights);
  // The slots' addresses come later than the others: their flags had to be cleared.
  if (tile.number == 0) return receive_addresses(x, s, 1u << kScratch | 1u << kFlags);
  return !__syncthreads_or(has_failed(s));
}

template <typename Element, int kCount>
__device__ void exchange(const CombineParams& p, Session& s, void* shared_memory) {
  const Exchange& x = p.exchange;
  const Chunk chunk(x.num_tokens);
  if (!open(x, s)) return;
  if (blockIdx.x == 0) post_buffers(p, s);
  prepare_slots(p, chunk, s);
  const uint32_t first_slots =
      p.sends_routes ? 1u << kScratch : 1u << kDestRank | 1u << kDestRow | 1u << kWeights;
  if (!receive_addresses(x, s, first_slots)) return;
  RouteTile<typename Element::Accumulator> routes(shared_memory, kTileAssignments);
  const Tiles tiles(chunk, kTileAssignments / (x.num_ranks * x.top_k));
  bool ready = true;
  tiles.for_each(s, [&](const Tile& tile) {
    ready = ready && receive_routes(p, s, tile, routes);
    if (!ready) return;
    // Only the routes are read from the peers, and those now are.
    if (tile.number + 1 == tile.count && warp_id() == kWarps - 1) conclude(x, s);
    Combine<Element, kCount>{p, x, s, routes, tile}.run();
  });
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ CombineParams p) {
  __shared__ Session s;
  exchange<Element, kCount>(p, s, dynamic_shared_memory<void>());
  __syncthreads();
  if (!has_failed(s)) return;
  spoil(p.sums, int64_t{p.exchange.num_tokens} * p.width * static_cast<int64_t>(sizeof(Element)));
}

}  // namespace

int threads_per_cta() { return kThreads; }

size_t combine_shared_bytes(DType dtype) {
  return kTileAssignments * (2 * sizeof(int) + (dtype == DType::kFloat64 ? 8 : 4));
}

const void* combine_function(DType dtype, bool wide) {
  const void* function = nullptr;
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    constexpr int kWide = wide_pack(sizeof(Element));
    function = wide ? reinterpret_cast<const void*>(&combine_kernel<Element, kWide>)
                    : reinterpret_cast<const void*>(&combine_kernel<Element, 1>);
  });
  return function;
}

}  // namespace freeio::cuda
