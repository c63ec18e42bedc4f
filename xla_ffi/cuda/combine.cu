// combine: expert outputs back to their tokens.
//
// Each rank sums a token's rows that it hosts, weighted, and stores that partial sum to a slot that
// the token's own rank keeps for it: one row crosses per (token, rank) pair. The token's rank adds
// the partial sums in order of rank, its own among them, straight from its rows.
#include "cuda/elements.cuh"
#include "cuda/geometry.h"
#include "cuda/kernels.h"
#include "cuda/session.cuh"

namespace freeio::cuda {
namespace {

constexpr int kAccesses = 8;  // of one lane in one slice
constexpr int kAhead = kWarps;  // slices by which pushing is ahead of summing

// Slot of `rank` among the ranks, other than the token's own, that have its rows.
__device__ int slot_of(int rank, uint32_t ranks, int own_rank) {
  return __popc(ranks & ~(1u << own_rank) & ((1u << rank) - 1));
}

template <typename Element, int kCount>
struct Combine {
  using Accumulator = typename Element::Accumulator;
  using Routes = TokenRoutes<Accumulator>;

  const CombineParams& p;
  const Exchange& x;
  Session& s;
  const Chunk& chunk;

  __device__ Combine(const CombineParams& params, Session& session, const Chunk& tokens)
      : p(params), x(params.exchange), s(session), chunk(tokens) {}

  __device__ int begin_column(int slice) const { return slice * p.slice_width; }
  __device__ int end_column(int slice) const {
    return min(begin_column(slice) + p.slice_width, p.width);
  }
  __device__ int64_t slot_index(int token, int slot) const {
    return static_cast<int64_t>(token) * p.num_slots + slot;
  }

  // Sum of this rank's rows in `mask`, in order of k, rounded once. Whole warp.
  __device__ Pack<Element, kCount> partial_sum(const Routes& routes, uint32_t mask, int column,
                                               bool active) const {
    constexpr int kBatch = 4;
    Accumulator sums[kCount] = {};
    while (mask != 0) {
      Pack<Element, kCount> packs[kBatch];
      Accumulator weights[kBatch];
      bool present[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        present[i] = mask != 0;
        const int k = present[i] ? __ffs(static_cast<int>(mask)) - 1 : 0;
        mask &= mask - 1;
        const int64_t row = __shfl_sync(kFullWarp, routes.row, k);
        weights[i] = __shfl_sync(kFullWarp, routes.weight, k);
        if (present[i] && active) {
          packs[i] = load_pack<Element, kCount>(static_cast<const Element*>(p.expert_out) +
                                                row * p.width + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (!present[i]) break;
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums[j] += weights[i] * widen(packs[i].elements[j]);
      }
    }
    Pack<Element, kCount> rounded;
#pragma unroll
    for (int j = 0; j < kCount; ++j) rounded.elements[j] = round_to<Element>(sums[j]);
    return rounded;
  }

  // This rank's partial sum of a peer's token, to the peer.
  __device__ void push(int rank, int token, int slice) const {
    const Routes routes(s.buffer<int32_t>(rank, kDestRank), s.buffer<int32_t>(rank, kDestRow),
                        s.buffer<Accumulator>(rank, kWeights), token, x.top_k);
    const uint32_t mask = routes.on(x.rank);
    if (mask == 0) return;
    const int64_t slot = slot_index(token, slot_of(x.rank, routes.ranks(), rank));
    Element* target = s.buffer<Element>(rank, kScratch) + slot * p.width;
    const int end = end_column(slice);
    for (int first = begin_column(slice); first < end; first += kWarpSize * kCount) {
      const int column = first + lane_id() * kCount;
      const auto sum = partial_sum(routes, mask, column, column < end);
      if (column < end) store_pack(target + column, sum);
    }
    __syncwarp();
    // Partner: the load in sum().
    if (lane_id() == 0) {
      store_release_system(s.buffer<uint32_t>(rank, kFlags) + slot * p.num_slices + slice, 1);
    }
  }

  // All partial sums of one of this rank's tokens.
  __device__ void sum(int token, int slice) const {
    const Routes routes(p.dest_rank, p.dest_row, static_cast<const Accumulator*>(p.weights), token,
                        x.top_k);
    const uint32_t mask = routes.on(x.rank);
    const uint32_t ranks = routes.ranks();
    if (const int rank = lane_id(); rank != x.rank && (ranks >> rank & 1) != 0) {
      const int64_t slot = slot_index(token, slot_of(rank, ranks, x.rank));
      // Partner: the store in push().
      wait_until(x, s, kWaitPartialSums, rank, [&] {
        return load_acquire_system(p.flags + slot * p.num_slices + slice) != 0;
      });
    }
    __syncwarp();
    const auto* partial_sums = static_cast<const Element*>(p.partial_sums);
    const int end = end_column(slice);
    for (int first = begin_column(slice); first < end; first += kWarpSize * kCount) {
      const int column = first + lane_id() * kCount;
      Accumulator total[kCount] = {};
      for (uint32_t rest = ranks; rest != 0; rest &= rest - 1) {
        const int rank = __ffs(static_cast<int>(rest)) - 1;
        Pack<Element, kCount> partial;
        if (rank == x.rank) {
          partial = partial_sum(routes, mask, column, column < end);
        } else if (column < end) {
          const int64_t slot = slot_index(token, slot_of(rank, ranks, x.rank));
          partial = load_pack<Element, kCount>(partial_sums + slot * p.width + column);
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) total[j] += widen(partial.elements[j]);
      }
      if (column >= end) continue;
      Pack<Element, kCount> rounded;
#pragma unroll
      for (int j = 0; j < kCount; ++j) rounded.elements[j] = round_to<Element>(total[j]);
      store_pack(static_cast<Element*>(p.sums) + static_cast<int64_t>(token) * p.width + column,
                 rounded);
    }
  }

  // Pushes for every peer and, kAhead slices behind, the sums. A sum waits only for pushes that
  // come before it in the peers' order, so waiting warps never hold up what they wait for.
  __device__ void run() const {
    const int64_t slices = static_cast<int64_t>(chunk.size()) * p.num_slices;
    const int64_t items = slices == 0 ? 0 : (slices + kAhead) * x.num_ranks;
    while (true) {
      const int64_t item = next_item(s);
      if (item >= items || *const_cast<volatile uint32_t*>(&s.failed) != 0) return;
      const int64_t turn = item % x.num_ranks;
      const bool pushes = turn != x.num_ranks - 1;
      const int64_t unit = item / x.num_ranks - (pushes ? 0 : kAhead);
      if (unit < 0 || unit >= slices) continue;
      const int token = chunk.begin + static_cast<int>(unit / p.num_slices);
      const int slice = static_cast<int>(unit % p.num_slices);
      if (pushes) {
        push(static_cast<int>((x.rank + 1 + turn) % x.num_ranks), token, slice);
      } else {
        sum(token, slice);
      }
    }
  }
};

// Arrival flags start at zero; then the peers learn where everything is.
__device__ void prepare_slots(const CombineParams& p, Session& s) {
  const Exchange& x = p.exchange;
  if (x.num_ranks == 1) return;
  const int64_t flags = static_cast<int64_t>(x.num_tokens) * p.num_slots * p.num_slices;
  const int64_t end = flags * (blockIdx.x + 1) / gridDim.x;
  for (int64_t i = flags * blockIdx.x / gridDim.x + threadIdx.x; i < end; i += kThreads) {
    p.flags[i] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0 && add_acquire_release_device(&self(x).prepared, 1) == gridDim.x - 1) {
    fence_system();
    post_address(x, s, kScratch, p.partial_sums);
    post_address(x, s, kFlags, p.flags);
  }
}

__device__ void post_buffers(const CombineParams& p, const Session& s) {
  const Exchange& x = p.exchange;
  post_signature(x, s);
  if (threadIdx.x != 0) return;
  post_address(x, s, kDestRank, p.dest_rank);
  post_address(x, s, kDestRow, p.dest_row);
  post_address(x, s, kWeights, p.weights);
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ CombineParams p) {
  __shared__ Session s;
  const Exchange& x = p.exchange;
  const Chunk chunk(x.num_tokens);
  if (!open(x, s)) return;
  if (blockIdx.x == 0) post_buffers(p, s);
  prepare_slots(p, s);
  constexpr uint32_t kSlots =
      1u << kScratch | 1u << kFlags | 1u << kDestRank | 1u << kDestRow | 1u << kWeights;
  if (receive_addresses(x, s, kSlots)) Combine<Element, kCount>(p, s, chunk).run();
  finish(x, s);
}

}  // namespace

int threads_per_cta() { return kThreads; }
int slice_accesses() { return kAccesses * kWarpSize; }

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
