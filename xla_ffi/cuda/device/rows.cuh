// Rows as warps move them, and the order of a CTA's work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "cuda/device/shares.cuh"
#include "cuda/geometry.h"

namespace freeio::cuda {

// Accesses of one lane that are in flight together: hides the latency of a peer's memory.
constexpr int kUnroll = kCopySlice / kWarpSize;

// A tile's work: pulling rows from the ranks, and a share of the padding to look at. Both are mixed
// evenly, so that link and memory are busy together from the first item to the last.
struct Work {
  int pulls;
  Team team;
  int first_block;
  int blocks;        // of this tile, in which padding is zeroed
  Blocks all;        // of all CTAs of the team
  uint32_t density;  // blocks for each item, rounded up, times 2^shift
  int shift;

  __device__ Work(const Tile& tile, int num_pulls, const Blocks& padding,
                  const Team& of = Team::all())
      : pulls(num_pulls), team(of), first_block(0), blocks(0), all(padding) {
    if (padding.count > 0) {
      const Chunk mine((padding.count - 1) / team.size + 1, tile.number, tile.count);
      first_block = mine.begin;
      blocks = mine.size();
    }
    shift = blocks > 0 ? __clz(blocks) : 0;
    density = blocks > 0 ? ((static_cast<uint32_t>(blocks) << shift) - 1) / size() + 1 : 0;
  }
  __device__ int size() const { return pulls + blocks; }
  // Blocks among the first `items`: none among none, all among all, and at most one more for each.
  __device__ int blocks_before(int items) const {
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(items)) * density;
    return min(static_cast<int>(product >> shift), blocks);
  }
  // First row of the tile's n-th block; at or beyond capacity: none. Most padding is one run of
  // rows at the end. Consecutive blocks lie far apart, so every CTA gets some of it, at all times.
  __device__ int64_t block_row(int n) const {
    const uint64_t place = static_cast<uint64_t>(first_block + n) * team.size + team.number;
    if (place >= static_cast<uint64_t>(all.count)) return static_cast<int64_t>(place) * all.rows;
    return static_cast<int64_t>(modulo(place * all.stride, all.count)) * all.rows;
  }
  __device__ static uint32_t modulo(uint64_t n, uint32_t m) {
    return n >> 32 == 0 ? static_cast<uint32_t>(n) % m : modulo_of_large(n, m);
  }
  [[gnu::noinline]] __device__ static uint32_t modulo_of_large(uint64_t n, uint32_t m) {
    return static_cast<uint32_t>(n % m);
  }
};

// Calls pull(number) and zero(first_row) until all of the tile's work is done. Whole warps.
template <typename Pull, typename Zero>
__device__ void run_work(const Work& work, CtaState& s, const Pull& pull, const Zero& zero) {
  for (int item = warp_id(); item < work.size(); item = next_item(s)) {
    const int blocks = work.blocks_before(item);
    if (work.blocks_before(item + 1) > blocks) {
      zero(work.block_row(blocks));
    } else {
      pull(item - blocks);
    }
  }
}

// Which rows of a block a call along a handle zeros, in the lanes: those that belong to no
// assignment, of the tail only if it is asked for. Whole warp.
__device__ inline uint32_t rows_to_zero(const Exchange& x, const Blocks& padding,
                                        const int32_t* row_source, int64_t first_row) {
  const int64_t row = first_row + lane_id();
  bool zeroes = lane_id() < padding.rows && row < x.capacity && row_source[row] < 0;
  if (zeroes && !x.zero_tail) {
    zeroes = pads_group(row_source, static_cast<int32_t>(row),
                        [&](int32_t n) { return x.alignment.remainder(n); });
  }
  return __ballot_sync(kFullWarp, zeroes);
}

// The source of a pull.
__device__ inline int source_rank(const Exchange& x, int pull) {
  return rank_of_turn(x, x.ranks.remainder(pull));
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
#pragma unroll 1
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
