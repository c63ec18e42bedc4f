// dispatch of calls with few assignments but many bytes: rows are pulled as in large.cu, and each
// rank sends its ids, from which every CTA finds the rows that it needs.
#include "cuda/device/opening.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/dispatch/routing_by_ids.cuh"
#include "cuda/dispatch/slices.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

__device__ void exchange(const DispatchParams& p, CtaState& s, int* rows) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Routing routing(reinterpret_cast<uint32_t*>(rows + kTileAssignments), x.num_experts);
  const AllIds all_ids(routing.end(), x);
  const Units units(p.slices, x.num_tokens, false);
  const Tiles tiles(units.tokens(), kTileAssignments / (x.num_ranks * x.top_k));
  const uint32_t leaves = leaf_addresses(p);
  // What needs no peer is loaded while the exchange opens.
  const IdPair early(p, static_cast<int>(threadIdx.x));
  if (!open(x, s, opening)) return;
  if (blockIdx.x == 0) post(x, s, leaves);
  send_ids(p, s, all_ids, Team::all(), early);
  clear_counts(x, routing);
  Work work = pulling_of(p, units, tiles[0]);
  receive_ids(x, s, all_ids);
  if (!receive_addresses(x, s, leaves)) return;
  count_ids(x, routing, all_ids);
  place_groups(p, routing);
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    find_rows(p, routing, all_ids, tile, rows);
    if (tile.number > 0) work = pulling_of(p, units, tile);
    pull_tile<true>(p, s, units, tile, work, rows,
                    [&](int64_t first_row) { zero_padding(p, routing, first_row); });
  });
  // Nothing has been stored to a peer but words that carry their flags, and what has been loaded
  // from one is here: it has been stored to this rank's rows.
  finish<false>(x, s);
}

__global__ void __launch_bounds__(kThreads, 1)
    dispatch_medium_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ CtaState s;
  exchange(p, s, dynamic_shared_memory<int>());
  leave(p.exchange, s, [&](const Team& spoilers) { spoil_results(p, spoilers); });
}

}  // namespace

Kernel dispatch_medium(int num_experts, int assignments_of_all) {
  return {reinterpret_cast<const void*>(&dispatch_medium_kernel),
          sizeof(int) * kTileAssignments + routing_bytes(num_experts) +
              all_ids_bytes(assignments_of_all)};
}

}  // namespace freeio::cuda
