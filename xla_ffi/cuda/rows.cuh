// Rows as warps move them, and the order of a CTA's work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/geometry.h"
#include "cuda/session.cuh"

namespace freeio::cuda {

// Accesses of one lane that are in flight together: hides the latency of a peer's memory.
constexpr int kUnroll = kCopySlice / kWarpSize;

// A tile's work: pulling rows from the ranks, and a share of the padding to zero. Both are mixed
// evenly, so that link and memory are busy together from the first item to the last.
struct Work {
  int pulls;
  int first_block;
  int blocks;      // to zero in this tile
  int all_blocks;  // of all CTAs
  Blocks all;

  __device__ Work(const Tile& tile, int pulls_per_token, int capacity, const Blocks& padding)
      : pulls(tile.size() * pulls_per_token),
        all_blocks((capacity - 1) / padding.rows + 1),
        all(padding) {
    const int mine = (all_blocks + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    first_block = share(mine, tile.number, tile.count);
    blocks = share(mine, tile.number + 1, tile.count) - first_block;
  }
  __device__ static int share(int all, int number, int count) {
    return static_cast<int>(static_cast<int64_t>(all) * number / count);
  }
  __device__ int size() const { return pulls + blocks; }
  // Blocks among the first `items`.
  __device__ int blocks_before(int items) const { return share(blocks, items, size()); }
  // First row of the tile's n-th block; at or beyond capacity: none. The padding is mostly one run
  // of rows at the end: consecutive blocks lie far apart, so every CTA and every moment gets some.
  __device__ int64_t block_row(int n) const {
    const int64_t place = static_cast<int64_t>(first_block + n) * gridDim.x + blockIdx.x;
    return (place < all_blocks ? place * all.stride % all_blocks : place) * all.rows;
  }
};

// Calls pull(number) and zero(first_row) until all of the tile's work is done. Whole warps.
template <typename Pull, typename Zero>
__device__ void run_work(const Work& work, Session& s, const Pull& pull, const Zero& zero) {
  for (int item = warp_id(); item < work.size(); item = next_item(s)) {
    const int blocks = work.blocks_before(item);
    if (work.blocks_before(item + 1) > blocks) {
      zero(work.block_row(blocks));
    } else {
      pull(item - blocks);
    }
  }
}

// The source of a pull: the peers first, then this rank itself, so that the link never waits.
__device__ inline int source_rank(const Exchange& x, int pull) {
  return (x.rank + 1 + pull % x.num_ranks) % x.num_ranks;
}

// A slice of one token, in the registers of a warp.
template <typename Access>
struct Values {
  Access values[kUnroll];

  __device__ void load(const std::byte* from, int bytes) {
    const auto* source = reinterpret_cast<const Access*>(from);
    const int count = bytes / static_cast<int>(sizeof(Access));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane_id() + u * kWarpSize < count) values[u] = source[lane_id() + u * kWarpSize];
    }
  }

  // To the rows that `row` names in the lanes of `mask`. Whole warp.
  __device__ void store(std::byte* rows, int64_t row_bytes, int bytes, int row,
                        uint32_t mask) const {
    const int count = bytes / static_cast<int>(sizeof(Access));
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1) {
      const int64_t to = __shfl_sync(kFullWarp, row, __ffs(static_cast<int>(mask)) - 1);
      auto* target = reinterpret_cast<Access*>(rows + to * row_bytes);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (lane_id() + u * kWarpSize < count) target[lane_id() + u * kWarpSize] = values[u];
      }
    }
  }
};

template <typename Access>
__device__ void zero_bytes(std::byte* bytes, int64_t size) {
  auto* target = reinterpret_cast<Access*>(bytes);
  for (int64_t i = lane_id(); i < size / static_cast<int64_t>(sizeof(Access)); i += kWarpSize) {
    target[i] = Access{};
  }
}

// Calls f with a value of the type that one lane accesses.
template <typename F>
__device__ void with_access(int access_bytes, const F& f) {
  switch (access_bytes) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(uint32_t{});
    case 2:
      return f(uint16_t{});
    default:
      return f(uint8_t{});
  }
}

}  // namespace freeio::cuda
