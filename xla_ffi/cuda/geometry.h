// Row arithmetic that host and kernels share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "core/host_device.h"

namespace freeio::cuda {

// Divides by a number that is fixed when a kernel is launched, in three instructions instead of
// about twenty. Kernels divide for each item of work.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t factor = 1u << 31;
  int32_t shift = 31;

  Divisor() = default;
  // n / d = n * factor >> shift for all n < 2^31: with 2^s >= d > 2^(s-1) and factor = 2^(31+s) / d
  // rounded up, the product is too large by less than n * d <= 2^(31+s) in units of 1 / d.
  explicit Divisor(int32_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  // n / d and n % d.
  FREEIO_HOST_DEVICE int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(n)} * factor >> shift);
  }
  FREEIO_HOST_DEVICE int32_t remainder(int32_t n) const {
    return n - quotient(n) * static_cast<int32_t>(divisor);
  }
};

// Packed rows of a block, among which one warp looks for padding. At most one for each lane. If
// there are few rows, blocks are small, so that no warp has much to zero.
inline int32_t block_rows(int32_t capacity) {
  constexpr int32_t kMost = 8;
  return std::clamp(capacity / 4096, 1, kMost);
}
// Where no row is zeroed: padding is only marked in the handle.
constexpr int32_t kMarkedBlockRows = 32;

// A step through the blocks of packed rows that visits each once, consecutive ones far apart.
inline int32_t spreading_stride(int32_t blocks) {
  auto stride = static_cast<int32_t>(blocks * int64_t{618} / 1000 + 1);
  while (std::gcd(stride, blocks) > 1) ++stride;
  return stride;
}

// Elements that one lane takes at a time if rows and buffers are aligned for it: 16 bytes. Elements
// of one byte: 8, because more sums would not fit in registers.
constexpr int wide_pack(int element_bytes) { return element_bytes == 1 ? 8 : 16 / element_bytes; }

// Slices of a row, in accesses of one lane. In a copy, all accesses of a slice are in flight
// together.
constexpr int kCopySlice = 8 * 32;

// In combine.
constexpr int kCombineSlice = 4 * 32;

// On so many CTAs or fewer, a large combine has a kernel of its own (combine/few.cu). It is faster
// on up to 64. But it has not been compared over NVLink, where a bulk store must arrive before the
// flag that follows it. So it serves nobody yet: when test_few_ctas_give_the_same_bits of
// tests/cuda/test_exchange.py has passed on two GPUs, say 64 here.
constexpr int kFewCtas = 0;
// There a slice is cut into passes of so many accesses. It has up to kMostPasses, if each CTA has
// this many slices of tokens.
constexpr int kCombinePass = 7 * 32;
constexpr int kMostPasses = 4;
constexpr int kSlicesOfCta = 128;

// In combine's transpose. With few tokens more warps share a row; with many, the fixed cost of a
// slice matters more.
inline int transpose_slice(int64_t num_tokens) { return num_tokens <= 1024 ? 2 * 32 : 8 * 32; }

// By how many slices the pushes of a CTA of combine are ahead of its sums. Meanwhile a partial sum
// crosses the link, and its flag, which is raised some pushes later, follows.
inline int combine_ahead(int num_ranks) { return 12 + 8 / std::max(1, num_ranks - 1); }

// Accesses in a slice that is sent in lines; with their flags they are a kilobyte: lines.cuh.
constexpr int kSentSlice = 60;
constexpr int kSentAccess = 16;  // bytes

// CTAs that receive for each CTA that sends, where no CTA does both. Receivers of dispatch have
// more to do, as they store each row several times; in combine both sum rows.
constexpr int kDispatchReceivers = 3;
constexpr int kCombineReceivers = 1;

}  // namespace freeio::cuda
