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
  using P = Pack<Element, kCount>;
  static constexpr int kColumns = 2;  // packs of one lane in one pass
  static constexpr int kStep = kWarpSize * kCount;

  const CombineParams& p;
  const Exchange& x;
  Session& s;
  const RouteTile<Accumulator>& routes_of;
  const Tile& tile;

  __device__ int64_t slot_index(int token, int slot) const {
    return static_cast<int64_t>(token) * p.num_slots + slot;
  }

  // Sums of this rank's rows in `mask`, in order of k, rounded once. Whole warp.
  __device__ void partial_sums(const Routes& routes, uint32_t mask, int first, int end,
                               P (&rounded)[kColumns]) const {
    constexpr int kBatch = 4;
    Accumulator sums[kColumns][kCount] = {};
    while (mask != 0) {
      P packs[kBatch][kColumns];
      Accumulator weights[kBatch];
      bool present[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        present[i] = mask != 0;
        const int k = present[i] ? __ffs(static_cast<int>(mask)) - 1 : 0;
        mask &= mask - 1;
        const int64_t row = __shfl_sync(kFullWarp, routes.row, k);
        weights[i] = __shfl_sync(kFullWarp, routes.weight, k);
        if (!present[i]) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (first + c * kStep >= end) continue;
          packs[i][c] = load_pack<Element, kCount>(static_cast<const Element*>(p.expert_out) +
                                                   row * p.width + first + c * kStep);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (!present[i]) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            sums[c][j] += weights[i] * widen(packs[i][c].elements[j]);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) rounded[c].elements[j] = round_to<Element>(sums[c][j]);
    }
  }

  __device__ void store_packs(Element* row, int first, int end, const P (&packs)[kColumns]) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (first + c * kStep < end) store_pack(row + first + c * kStep, packs[c]);
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
      P packs[kColumns];
      partial_sums(routes, mask, first, end, packs);
      store_packs(target, first, end, packs);
    });
    __syncwarp();
    // Partner: the load in sum().
    if (lane_id() == 0) {
      store_release_system(s.buffer<uint32_t>(rank, kFlags) + slot * p.num_slices + slice, 1);
    }
  }

  // Waits for the partial sums of one of this rank's tokens. Whole warp.
  __device__ void wait_for_partial_sums(uint32_t ranks, int token, int slice) const {
    if (const int rank = lane_id(); rank != x.rank && (ranks >> rank & 1) != 0) {
      const int64_t slot = slot_index(token, slot_of(rank, ranks, x.rank));
      // Partner: the store in push().
      wait_until(x, s, kWaitPartialSums, rank, [&] {
        return load_acquire_system(p.flags + slot * p.num_slices + slice) != 0;
      });
    }
    __syncwarp();
  }

  // All partial sums of one of this rank's tokens, in order of rank.
  __device__ void sum(int token, int slice) const {
    constexpr int kBatch = 2;
    const Routes routes = routes_of.of(x.rank, token - tile.begin);
    const uint32_t mask = routes.on(x.rank);
    const uint32_t ranks = routes.ranks();
    wait_for_partial_sums(ranks, token, slice);
    const Element* slots =
        static_cast<const Element*>(p.partial_sums) + slot_index(token, 0) * p.width;
    for_passes(slice, [&](int first, int end) {
      Accumulator totals[kColumns][kCount] = {};
      P own[kColumns];
      uint32_t rest = ranks;
      do {
        P packs[kBatch][kColumns];
        int batch[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          batch[i] = __ffs(static_cast<int>(rest)) - 1;  // -1: no more
          rest &= rest - 1;
          if (batch[i] < 0 || batch[i] == x.rank) continue;
          const Element* slot = slots + slot_of(batch[i], ranks, x.rank) * int64_t{p.width};
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (first + c * kStep >= end) continue;
            packs[i][c] = load_pack<Element, kCount>(slot + first + c * kStep);
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (batch[i] < 0) continue;
          if (batch[i] == x.rank) partial_sums(routes, mask, first, end, own);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
              totals[c][j] += widen((batch[i] == x.rank ? own : packs[i])[c].elements[j]);
            }
          }
        }
      } while (rest != 0);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) own[c].elements[j] = round_to<Element>(totals[c][j]);
      }
      store_packs(static_cast<Element*>(p.sums) + static_cast<int64_t>(token) * p.width, first,
                  end, own);
    });
  }

  // Pushes for every peer and, kAhead slices behind, the sums. A sum waits only for pushes that
  // come before it in the peers' order, so waiting warps never hold up what they wait for.
  __device__ void run() const {
    const int slices = tile.size() * p.num_slices;
    const int items = slices == 0 ? 0 : (slices + kAhead) * x.num_ranks;
    while (true) {
      const int item = next_item(s);
      if (item >= items || has_failed(s)) return;
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
  extern __shared__ uint64_t shared_memory[];
  __shared__ Session s;
  const Exchange& x = p.exchange;
  const Chunk chunk(x.num_tokens);
  if (!open(x, s)) return;
  if (blockIdx.x == 0) post_buffers(p, s);
  prepare_slots(p, s);
  constexpr uint32_t kSlots =
      1u << kScratch | 1u << kFlags | 1u << kDestRank | 1u << kDestRow | 1u << kWeights;
  if (receive_addresses(x, s, kSlots)) {
    RouteTile<typename Element::Accumulator> routes(shared_memory, kTileAssignments);
    for_tiles(chunk, kTileAssignments / (x.num_ranks * x.top_k), s, [&](const Tile& tile) {
      routes.fetch(x, s, tile, p.dest_rank, p.dest_row, p.weights);
      Combine<Element, kCount>{p, x, s, routes, tile}.run();
    });
  }
  finish(x, s);
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
