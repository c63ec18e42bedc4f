// The kernel of a large combine: expert outputs back to their tokens.
//
// Each rank sums its weighted rows of a token, and stores this partial sum to a slot on the token's
// rank. So one row crosses a link for each pair of a token and a rank. The token's rank adds the
// partial sums in order of rank. It computes its own partial sum straight from its rows. (Small
// calls: small.cu.)
//
// What its warps do is a type, Warp: PushingWarp, or FewWarp where few CTAs run the kernel.
#pragma once

#include "cuda/combine/announcer.cuh"
#include "cuda/device/end.cuh"
#include "cuda/device/opening.cuh"
#include "cuda/device/routes.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/geometry.h"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

// Clears the arrival flags in scratch. When all CTAs have done so, the peers get the addresses. A
// CTA clears the flags that it will read itself, so it need not wait for other CTAs.
__device__ void prepare_slots(const CombineParams& p, const Chunk& units, CtaState& s) {
  const Exchange& x = p.exchange;
  if (x.num_ranks == 1) return;
  const int64_t end = static_cast<int64_t>(units.end) * p.num_slots;
  for (int64_t i = static_cast<int64_t>(units.begin) * p.num_slots + threadIdx.x; i < end;
       i += kThreads) {
    p.flags[i] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0 &&
      add_acquire_release_device(&self(x).num_prepared_ctas, 1) == gridDim.x - 1) {
    fence_system();
    post_address(x, s, kScratch);
    post_address(x, s, kFlags);
  }
}

// Gets the routes of the tile, and with the first tile the addresses of the peers' slots. False,
// for all threads: they did not come.
template <typename Accumulator>
__device__ bool receive_routes(const CombineParams& p, CtaState& s, const Tile& tile,
                               RouteTile<Accumulator>& routes) {
  const Exchange& x = p.exchange;
  routes.begin(x, tile);
  routes.take(x, s, tile, p.dest_rank, p.dest_row, p.weights, p.sends_routes);
  if (tile.number > 0) return !__syncthreads_or(has_failed(s));
  // The address of the flags comes with that of the slots, when both are ready.
  const uint32_t flags = p.sends_routes ? 0 : 1u << kFlags;
  return receive_addresses(x, s, 1u << kScratch | flags);
}

template <typename Warp>
__device__ void exchange(const CombineParams& p, CtaState& s, Announcer& announcer,
                         void* shared_memory) {
  using Accumulator = typename Warp::Accumulator;
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Units units(p.slices, x.num_tokens, true);
  // These loads need no peer, so they run while the exchange opens.
  const Chunk sent(p.sends_routes ? x.num_tokens * x.top_k : 0);
  const SentAssignment first(sent.begin + static_cast<int>(threadIdx.x), sent.end, p.dest_rank,
                             p.dest_row, p.weights);
  if (!open(x, s, opening)) return;
  enter(s, kRouting);
  send_routes(x, s, sent, first, p.dest_rank, p.dest_row, p.weights);
  if (blockIdx.x == 0) post(x, s, p.sends_routes ? 1u << kScratch : kRouteSlots);
  if (!p.sends_routes) {
    prepare_slots(p, units.chunk, s);
    enter(s, kAgreeing);
    if (!receive_addresses(x, s, kRouteSlots)) return;
  }
  constexpr int kAssignments = tile_assignments<Accumulator>(Warp::kTileBytes);
  RouteTile<Accumulator> routes(shared_memory, kAssignments);
  typename Warp::Ring ring(x, static_cast<std::byte*>(shared_memory) + Warp::kTileBytes);
  const Tiles tiles(units.tokens(), kAssignments / (x.num_ranks * x.top_k));
  // The last warp raises the flags of what the others push.
  const int warps = x.num_ranks > 1 ? kWarps - 1 : kWarps;
  bool ready = true;
  tiles.for_each(s, warps, [&](const Tile& tile) {
    announcer.begin();
    enter(s, kAgreeing);
    ready = ready && receive_routes(p, s, tile, routes);
    if (!ready) return;
    Warp::arrange(x, routes);
    enter(s, kMoving);
    // The CTA reads only routes from the peers, and it now has all of them.
    if (tile.number + 1 == tile.count && warp_id() == warps - 1) conclude<false>(x, s);
    if (warp_id() == warps) return announcer.run(warps);
    Warp(p, s, routes, tile, announcer, units.of(tile), ring).run();
    if (warps < kWarps) announcer.leave();
  });
}

template <typename Warp>
__global__ void __launch_bounds__(kThreads, 1)
    combine_large_kernel(const __grid_constant__ CombineParams p) {
  if constexpr (Warp::kIsOnThisGpu) {
    __shared__ CtaState s;
    __shared__ Announcer announcer;
    exchange<Warp>(p, s, announcer, dynamic_shared_memory<void>());
    leave(p.exchange, s, [&](const Team& spoilers) {
      const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(typename Warp::ElementType));
      spoil(spoilers, p.sums, p.exchange.num_tokens * row_bytes);
    });
  }
}

template <typename Warp>
Kernel large_kernel() {
  return {reinterpret_cast<const void*>(&combine_large_kernel<Warp>),
          Warp::kTileBytes + Warp::kRingBytes};
}

}  // namespace
}  // namespace freeio::cuda
