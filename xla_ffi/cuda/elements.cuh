// Elements as one lane loads, sums and stores them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/session.cuh"

namespace freeio::cuda {

// What one lane takes at a time.
template <typename Element, int kCount>
struct alignas(sizeof(Element) * kCount) Pack {
  Element elements[kCount];
};

template <typename Element, int kCount>
__device__ Pack<Element, kCount> load_pack(const Element* from) {
  using P = Pack<Element, kCount>;
  if constexpr (sizeof(P) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    P pack;
    memcpy(&pack, &bits, sizeof(pack));
    return pack;
  } else {
    return *reinterpret_cast<const P*>(from);
  }
}

template <typename Element, int kCount>
__device__ void store_pack(Element* to, const Pack<Element, kCount>& pack) {
  using P = Pack<Element, kCount>;
  if constexpr (sizeof(P) == 16) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *reinterpret_cast<P*>(to) = pack;
  }
}

// Rounding and widening as in core/dtype.h, by the GPU's own instructions where it has them. Only
// the payloads of NaNs differ.
template <typename Element>
__device__ inline Element round_to(typename Element::Accumulator value) {
  return Element::round(value);
}
template <>
__device__ inline BFloat16 round_to<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Float16 round_to<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

template <typename Element>
__device__ inline typename Element::Accumulator widen(Element value) {
  return Element::widen(value);
}
template <>
__device__ inline float widen<Float16>(Float16 value) {
  return __half2float(__ushort_as_half(value.storage));
}

// The routes of one token, in the lanes of a warp: lane k has assignment k.
template <typename Accumulator>
struct TokenRoutes {
  int rank = -1;  // -1: no row
  int row = -1;
  Accumulator weight = 1;

  // Lanes whose row is on `where`.
  __device__ uint32_t on(int where) const { return __ballot_sync(kFullWarp, rank == where); }
  // One bit for each rank that has a row.
  __device__ uint32_t ranks() const {
    return __reduce_or_sync(kFullWarp, rank >= 0 ? 1u << rank : 0u);
  }
};

// The routes of a tile's tokens, of all ranks: [R, tokens, K] in shared memory.
template <typename Accumulator>
struct RouteTile {
  Accumulator* weights;
  int* ranks;
  int* rows;
  int per_rank;  // assignments
  int top_k;

  __device__ RouteTile(void* memory, int capacity)
      : weights(static_cast<Accumulator*>(memory)),
        ranks(reinterpret_cast<int*>(weights + capacity)),
        rows(ranks + capacity),
        per_rank(0),
        top_k(0) {}

  // Reads them all at once, the peers' over the link. All threads.
  __device__ void fetch(const Exchange& x, const Session& s, const Tile& tile,
                        const int32_t* dest_rank, const int32_t* dest_row, const void* weight) {
    top_k = x.top_k;
    per_rank = tile.size() * top_k;
    const int64_t first = static_cast<int64_t>(tile.begin) * top_k;
    for (int i = static_cast<int>(threadIdx.x); i < size(x); i += kThreads) {
      const int rank = i / per_rank;
      const int64_t a = first + i % per_rank;
      const bool own = rank == x.rank;
      const auto* weight_array = own ? static_cast<const Accumulator*>(weight)
                                     : s.buffer<const Accumulator>(rank, kWeights);
      ranks[i] = own ? dest_rank[a] : s.buffer<int32_t>(rank, kDestRank)[a];
      rows[i] = own ? dest_row[a] : s.buffer<int32_t>(rank, kDestRow)[a];
      weights[i] = weight != nullptr ? weight_array[a] : Accumulator{1};
    }
    __syncthreads();
  }
  __device__ int size(const Exchange& x) const { return per_rank * x.num_ranks; }
  __device__ int first_of(int rank, int tile_token) const {
    return rank * per_rank + tile_token * top_k;
  }
  __device__ TokenRoutes<Accumulator> of(int rank, int tile_token) const {
    TokenRoutes<Accumulator> routes;
    if (lane_id() < top_k) {
      const int i = first_of(rank, tile_token) + lane_id();
      routes.rank = ranks[i];
      routes.row = rows[i];
      routes.weight = weights[i];
    }
    return routes;
  }
};

}  // namespace freeio::cuda
