// dispatch of large calls: routing by counts, and token rows to their final places.
//
// The expert's rank pulls. It reads a token's row from the source's tensor, once, and stores it to
// each of the row's places here. So a row crosses a link once, no rank writes into a tensor of
// another, and no row is copied twice. Counts and places go to the ranks as words that carry their
// own flag. No row waits for a flag.
#include "core/layout.h"
#include "cuda/device/opening.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/dispatch/assignment_rows.cuh"
#include "cuda/dispatch/routing_by_counts.cuh"
#include "cuda/dispatch/slices.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

__device__ void exchange(const DispatchParams& p, CtaState& s, int* rows) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Routing routing(reinterpret_cast<uint32_t*>(rows + kTileAssignments), x.num_experts);
  const Units units(p.slices, x.num_tokens, false);
  const Chunk chunk = units.tokens();
  const Tiles tiles(chunk, kTileAssignments / (x.num_ranks * x.top_k));
  const uint32_t leaves = leaf_addresses(p);
  // These loads need no peer, so they run while the exchange opens.
  const SegmentIds early(p, chunk);
  if (!open(x, s, opening)) return;
  enter(s, kRouting);
  if (blockIdx.x == 0) post(x, s, leaves);
  Work work = pulling_of(p, units, tiles[0]);
  if (p.places_in_scratch) clear_places(p, chunk, s);
  const int id = first_id(p, chunk);
  count_and_send(p, s, routing, early.segment, early.quads);
  __syncthreads();
  enter(s, kAgreeing);
  if (p.places_in_scratch && !receive_addresses(x, s, 1u << kScratch)) return;
  enter(s, kRouting);
  send_places(p, s, routing, chunk, id);
  enter(s, kAgreeing);
  receive_counts(p, s, routing, early.segment, reinterpret_cast<uint32_t*>(rows));
  if (!receive_addresses(x, s, leaves)) return;
  enter(s, kRouting);
  place_groups(p, routing);
  if (blockIdx.x == 0 && warp_id() == 0) store_num_invalid(p, s);
  __syncthreads();
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    enter(s, kAgreeing);
    if (!find_rows(p, s, routing, tile, rows)) return;
    enter(s, kMoving);
    if (tile.number > 0) work = pulling_of(p, units, tile);
    pull_tile<true>(p, s, units, tile, work, rows,
                    [&](int64_t first_row) { zero_padding(p, routing, first_row); });
  });
  // The end publishes nothing: this rank has stored only words to its peers, which carry their own
  // flags. All loads from peers have ended, as their values have been stored to this rank's rows.
  finish<false>(x, s);
}

__global__ void __launch_bounds__(kThreads, 1)
    dispatch_large_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ CtaState s;
  exchange(p, s, dynamic_shared_memory<int>());
  leave(p.exchange, s, [&](const Team& spoilers) { spoil_results(p, spoilers); });
}

}  // namespace

Kernel dispatch_large(int num_experts) {
  return {reinterpret_cast<const void*>(&dispatch_large_kernel),
          sizeof(int) * kTileAssignments + routing_bytes(num_experts)};
}

}  // namespace freeio::cuda
