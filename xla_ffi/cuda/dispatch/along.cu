// dispatch along a handle. As large.cu, but the rows of assignments are in the handles, so each
// rank reads the handles of the others.
#include "cuda/device/opening.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/dispatch/slices.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

// Rows here of the tile's assignments, of all ranks: [R, tokens, K] in shared memory; -1: none. All
// threads.
__device__ void read_rows(const DispatchParams& p, const CtaState& s, const Tile& tile, int* rows) {
  const Exchange& x = p.exchange;
  const int per_rank = tile.size() * x.top_k;
  const int64_t first = static_cast<int64_t>(tile.begin) * x.top_k;
  for (int i = static_cast<int>(threadIdx.x); i < per_rank * x.num_ranks; i += kThreads) {
    const int rank = i / per_rank;
    const int64_t a = first + i % per_rank;
    const int dest = rank == x.rank ? p.dest_rank[a] : s.buffer<int32_t>(rank, kDestRank)[a];
    const int row = rank == x.rank ? p.dest_row[a] : s.buffer<int32_t>(rank, kDestRow)[a];
    rows[i] = dest == x.rank ? row : -1;
  }
}

// Zeros those rows of a block that belong to no assignment, the tail only if it is asked for. Whole
// warp.
__device__ void zero_padding(const DispatchParams& p, int64_t first_row) {
  zero_rows(p, first_row, rows_to_zero(p.exchange, p.padding, p.row_source, first_row));
}

__device__ void exchange(const DispatchParams& p, CtaState& s, int* rows) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Units units(p.slices, x.num_tokens, false);
  const Tiles tiles(units.tokens(), kTileAssignments / (x.num_ranks * x.top_k));
  const uint32_t addresses = leaf_addresses(p) | 1u << kDestRank | 1u << kDestRow;
  if (!open(x, s, opening)) return;
  enter(s, kAgreeing);
  if (blockIdx.x == 0) post(x, s, addresses);
  Work work = pulling_of(p, units, tiles[0]);
  if (!receive_addresses(x, s, addresses)) return;
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    enter(s, kAgreeing);
    read_rows(p, s, tile, rows);
    if (__syncthreads_or(has_failed(s))) return;
    enter(s, kMoving);
    if (tile.number > 0) work = pulling_of(p, units, tile);
    pull_tile<false>(p, s, units, tile, work, rows,
                     [&](int64_t first_row) { zero_padding(p, first_row); });
  });
  // The end publishes nothing: this rank has stored only words to its peers, which carry their own
  // flags. All loads from peers have ended, as their values have been stored to this rank's rows.
  finish<false>(x, s);
}

__global__ void __launch_bounds__(kThreads, 1)
    dispatch_along_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ CtaState s;
  exchange(p, s, dynamic_shared_memory<int>());
  leave(p.exchange, s, [&](const Team& spoilers) { spoil_rows(p, spoilers); });
}

}  // namespace

Kernel dispatch_along() {
  return {reinterpret_cast<const void*>(&dispatch_along_kernel), sizeof(int) * kTileAssignments};
}

}  // namespace freeio::cuda
