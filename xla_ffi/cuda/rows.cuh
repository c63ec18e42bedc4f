// Rows as warps move them, and the order of a CTA's work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/geometry.h"
#include "cuda/session.cuh"

namespace freeio::cuda {

// Accesses of one lane that are in flight together: hides the latency of a peer's memory.
constexpr int kUnroll = 8;

// A CTA's work: pulling rows from the ranks, and zeroing its share of the padding. Both are mixed
// evenly, so that link and memory are busy together from the first item to the last.
struct Work {
  int64_t pulls;
  int64_t zero_blocks;
  int64_t all_zero_blocks;  // of all CTAs
  int64_t stride;

  __device__ Work(int64_t num_pulls, int64_t capacity, int64_t row_stride)
      : pulls(num_pulls),
        zero_blocks(0),
        all_zero_blocks((capacity + kBlockRows - 1) / kBlockRows),
        stride(row_stride) {
    zero_blocks = (all_zero_blocks + gridDim.x - 1) / gridDim.x;
  }
  __device__ int64_t size() const { return pulls + zero_blocks; }
  // Zero blocks among the first `items`.
  __device__ int64_t zero_blocks_before(int64_t items) const { return items * zero_blocks / size(); }
  // First row of the CTA's n-th block; at or beyond capacity: none. The padding is mostly one run
  // of rows at the end: consecutive blocks lie far apart, so every CTA and every moment gets some.
  __device__ int64_t block_row(int64_t n) const {
    const int64_t place = n * gridDim.x + blockIdx.x;
    const int64_t block = place < all_zero_blocks ? place * stride % all_zero_blocks : place;
    return block * kBlockRows;
  }
};

// Calls pull(item) and zero(first_row) until all of the CTA's work is done. Whole warps.
template <typename Pull, typename Zero>
__device__ void run_work(const Work& work, Session& s, const Pull& pull, const Zero& zero) {
  while (true) {
    const int64_t item = next_item(s);
    if (item >= work.size() || *const_cast<volatile uint32_t*>(&s.failed) != 0) return;
    const int64_t zeros = work.zero_blocks_before(item);
    if (work.zero_blocks_before(item + 1) > zeros) {
      zero(work.block_row(zeros));
    } else {
      pull(item - zeros);
    }
  }
}

// The source of a pull: the peers first, then this rank itself, so that the link never waits.
__device__ inline int source_rank(const Exchange& x, int64_t pull) {
  return static_cast<int>((x.rank + 1 + pull % x.num_ranks) % x.num_ranks);
}

// Copies `bytes` of one token to the rows that `row` names in the lanes of `mask`. Whole warp.
template <typename Access>
__device__ void copy_to_rows(const std::byte* from, int bytes, std::byte* rows, int64_t row_bytes,
                             int row, uint32_t mask) {
  const int count = bytes / static_cast<int>(sizeof(Access));
  const auto* source = reinterpret_cast<const Access*>(from);
  for (int base = lane_id(); base - lane_id() < count; base += kUnroll * kWarpSize) {
    Access values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kWarpSize < count) values[u] = source[base + u * kWarpSize];
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const int64_t to = __shfl_sync(kFullWarp, row, __ffs(static_cast<int>(rest)) - 1);
      auto* target = reinterpret_cast<Access*>(rows + to * row_bytes);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (base + u * kWarpSize < count) target[base + u * kWarpSize] = values[u];
      }
    }
  }
}

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
