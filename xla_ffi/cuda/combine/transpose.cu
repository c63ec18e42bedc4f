// combine_transpose: the gradients of combine by the rows and by the weights.
//
// The expert's rank pulls the cotangent x of each token of which it has rows, once. It stores
// weight * x to each of these rows, and sends <expert_out row, x> back to the token's rank.
#include "cuda/combine/pulling_warp.cuh"
#include "cuda/device/end.cuh"
#include "cuda/device/opening.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

constexpr int kSharedBytes = 56 << 10;  // for the routes of a tile and its dot products
constexpr int kRingBytes = 160 << 10;   // for rows on their way

// Assignments whose routes and dot products fit.
__host__ __device__ constexpr int tile_capacity(size_t accumulator_bytes, int num_slices) {
  return kSharedBytes / static_cast<int>(2 * sizeof(int) + accumulator_bytes * (1 + num_slices));
}

template <typename Element, int kCount>
__device__ void exchange(const CombineTransposeParams& p, CtaState& s, void* shared_memory) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Chunk chunk(x.num_tokens);
  // These loads need no peer, so they run while the exchange opens.
  const Chunk sent(p.sends_routes ? x.num_tokens * x.top_k : 0);
  const SentAssignment first(sent.begin + static_cast<int>(threadIdx.x), sent.end, p.dest_rank,
                             p.dest_row, p.weights);
  if (!open(x, s, opening)) return;
  send_routes(x, s, sent, first, p.dest_rank, p.dest_row, p.weights);
  const uint32_t slots = 1u << kWeightGrads | 1u << kFirstLeaf | (p.sends_routes ? 0 : kRouteSlots);
  if (blockIdx.x == 0) post(x, s, slots);
  if (!receive_addresses(x, s, slots)) return;
  using Warp = PullingWarp<Element, kCount>;
  using Accumulator = typename Element::Accumulator;
  const int capacity = tile_capacity(sizeof(Accumulator), p.num_slices);
  auto* dots = static_cast<Accumulator*>(shared_memory);
  RouteTile<Accumulator> routes(dots + capacity * p.num_slices, capacity);
  auto& ring = *reinterpret_cast<RowRing*>(static_cast<std::byte*>(shared_memory) + kSharedBytes);
  RowFetcher fetcher{ring, p.slice_width * static_cast<int>(sizeof(Element)), p.ring_slots};
  if constexpr (Warp::kFetches) ring.begin();
  const Tiles tiles(chunk, capacity / (x.num_ranks * x.top_k));
  bool ready = true;
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    if (!ready) return;
    routes.begin(x, tile);
    routes.take(x, s, tile, p.dest_rank, p.dest_row, p.weights, p.sends_routes);
    ready = !__syncthreads_or(has_failed(s));
    if (!ready) return;
    const Work work(tile, tile.size() * p.num_slices * x.num_ranks, p.padding);
    const Warp warp{p, x, s, routes, dots, tile, work, ring};
    if constexpr (!Warp::kFetches) {
      run_work(
          work, s, [&](int item) { warp.pull(item); },
          [&](int64_t row) { warp.zero_padding(row); });
    } else if (warp_id() == kWarps - 1) {
      fetcher.run(s, work.size(), lanes_of(x.top_k), kWarps - 1, warp);
    } else {
      warp.run();
    }
    if (p.weight_grads != nullptr) warp.send_weight_grads();
  });
  // The weights' gradients are in the peers' memory; this tells the peers so.
  finish<true>(x, s);
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    combine_transpose_kernel(const __grid_constant__ CombineTransposeParams p) {
  __shared__ CtaState s;
  exchange<Element, kCount>(p, s, dynamic_shared_memory<void>());
  leave(p.exchange, s, [&](const Team& spoilers) {
    const Exchange& x = p.exchange;
    const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(Element));
    const int64_t assignments = int64_t{x.num_tokens} * x.top_k;
    const auto weight_bytes = static_cast<int64_t>(sizeof(typename Element::Accumulator));
    spoil(spoilers, p.rows, x.capacity * row_bytes);
    spoil(spoilers, p.weight_grads, assignments * weight_bytes);
  });
}

}  // namespace

bool combine_transpose_fits(size_t accumulator_bytes, int num_slices, int assignments) {
  return tile_capacity(accumulator_bytes, num_slices) >= assignments;
}

Kernel combine_transpose(DType dtype, bool wide) {
  Kernel kernel;
  kernel.ring_at = kSharedBytes + sizeof(RowRing);
  kernel.shared_bytes = kernel.ring_at + kRingBytes;
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    constexpr int kWide = wide_pack(sizeof(Element));
    kernel.function = wide
                          ? reinterpret_cast<const void*>(&combine_transpose_kernel<Element, kWide>)
                          : reinterpret_cast<const void*>(&combine_transpose_kernel<Element, 1>);
  });
  return kernel;
}

}  // namespace freeio::cuda
