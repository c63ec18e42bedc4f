// Row arithmetic that host and kernels share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace freeio::cuda {

// Packed rows that one warp looks through for padding, at most as many as it has lanes: few where
// there are few, so that no warp has much to zero.
inline int32_t block_rows(int32_t capacity) {
  constexpr int32_t kMost = 8;
  return std::clamp(capacity / 4096, 1, kMost);
}

// A step through the blocks of packed rows that visits each once, consecutive ones far apart.
inline int32_t spreading_stride(int32_t capacity) {
  const int32_t each = block_rows(capacity);
  const int32_t blocks = (capacity - 1) / each + 1;
  auto stride = static_cast<int32_t>(blocks * int64_t{618} / 1000 + 1);
  while (std::gcd(stride, blocks) > 1) ++stride;
  return stride;
}

// Elements that one lane takes at a time where rows and buffers are aligned for it: 16 bytes, but
// no more sums than registers hold.
constexpr int wide_pack(int element_bytes) { return element_bytes == 1 ? 8 : 16 / element_bytes; }

// Accesses of the lanes of one warp to one slice of a row: all in flight together in a copy.
constexpr int kCopySlice = 8 * 32;

// The same in combine.
constexpr int kCombineSlice = 4 * 32;

// The same in its transpose. With few tokens more warps share a row; with many, a slice's fixed
// cost counts for more.
inline int transpose_slice(int64_t num_tokens) { return num_tokens <= 1024 ? 2 * 32 : 8 * 32; }

}  // namespace freeio::cuda
