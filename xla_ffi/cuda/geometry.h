// Row arithmetic that host and kernels share.
#pragma once

#include <cstdint>
#include <numeric>

namespace freeio::cuda {

// Packed rows that one warp looks through for padding.
constexpr int kBlockRows = 8;

// A step through the blocks of packed rows that visits each once, consecutive ones far apart.
inline int64_t spreading_stride(int64_t capacity) {
  const int64_t blocks = (capacity + kBlockRows - 1) / kBlockRows;
  int64_t stride = blocks * 618 / 1000 + 1;
  while (std::gcd(stride, blocks) > 1) ++stride;
  return stride;
}

// Elements that one lane takes at a time where rows and buffers are aligned for it: 16 bytes, but
// no more sums than registers hold.
constexpr int wide_pack(int element_bytes) { return element_bytes == 1 ? 8 : 16 / element_bytes; }

}  // namespace freeio::cuda
