// Rows of small calls, as they are sent: in lines of 128 bytes, the last four of which say that the
// others are there. So no flag of its own follows them, and no fence waits for them, for a
// thirty-first more bytes.
#pragma once

#include "cuda/session.cuh"

namespace freeio::cuda {

// A slice is two halves of 31 accesses of 16 bytes, in four lines each. A warp stores a half at
// once: the last lane of each line has a flag in its last four bytes, and what that leaves over of
// three of these lanes is in the fourth, which has no access of its own. Of a slice that fits in
// its first half, only that is sent.
struct LineSlice {
  static constexpr int kLanesOfLine = 8;
  static constexpr int kAccess = kSentAccess;
  static constexpr int kAccessesOfHalf = kSentSlice / 2;
  static constexpr int kLast = kWarpSize - 1;
  static constexpr int kNone = 1 << 24;

  uint4 accesses[2] = {};  // of this lane, one of each half

  __device__ static bool has_flag() { return lane_id() % kLanesOfLine == kLanesOfLine - 1; }

  // Which accesses of the slice are this lane's.
  __device__ static int place(int half) {
    return lane_id() == kLast ? kNone : half * kAccessesOfHalf + lane_id();
  }
  // How many halves, and lines, a slice of so many bytes is.
  __device__ static int halves(int bytes) { return bytes <= kAccessesOfHalf * kAccess ? 1 : 2; }
  __device__ static int lines(int bytes) { return halves(bytes) * (kWarpSize / kLanesOfLine); }

  __device__ void load(const std::byte* from, int bytes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (place(i) * kAccess < bytes) {
        accesses[i] = reinterpret_cast<const uint4*>(from)[place(i)];
      }
    }
  }

  // To the rows that `row` names in the lanes of `mask`. Whole warp.
  __device__ void store(std::byte* rows, int64_t row_bytes, int bytes, int row,
                        uint32_t mask) const {
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1) {
      const int64_t to = __shfl_sync(kFullWarp, row, __ffs(static_cast<int>(mask)) - 1);
      auto* target = reinterpret_cast<uint4*>(rows + to * row_bytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (place(i) * kAccess < bytes) target[place(i)] = accesses[i];
      }
    }
  }

  // Makes room for the flags. Whole warp, before send().
  __device__ void give() {
#pragma unroll
    for (uint4& it : accesses) {
      const uint32_t x = __shfl_sync(kFullWarp, it.w, kLanesOfLine - 1);
      const uint32_t y = __shfl_sync(kFullWarp, it.w, 2 * kLanesOfLine - 1);
      const uint32_t z = __shfl_sync(kFullWarp, it.w, 3 * kLanesOfLine - 1);
      if (lane_id() == kLast) it = {x, y, z, 0};
    }
  }

  // To a peer. Whole warp.
  __device__ void send(SentSlice& slice, int bytes, uint32_t epoch) const {
    uint4* const parts = reinterpret_cast<uint4*>(&slice) + lane_id();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == halves(bytes)) break;
      uint4 it = accesses[i];
      if (has_flag()) it.w = epoch;
      // Partner: the loads in start() on the peer.
      store_line(parts + i * kWarpSize, it);
    }
  }

  // Loads what the peer sends, whether it is there yet or not. Whole warp.
  __device__ void start(const SentSlice& slice, int bytes) {
    const uint4* const parts = reinterpret_cast<const uint4*>(&slice) + lane_id();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == halves(bytes)) break;
      // Partner: the stores in send() on the peer.
      accesses[i] = load_line(parts + i * kWarpSize);
    }
  }

  // Whether the lane's parts of what start() has loaded were there, as far as it can see.
  __device__ bool is_here(int bytes, uint32_t epoch) const {
    return !has_flag() ||
           (accesses[0].w == epoch && (halves(bytes) == 1 || accesses[1].w == epoch));
  }

  // Puts back what give() has moved, once all lanes' parts are there. Whole warp.
  __device__ void take() {
#pragma unroll
    for (uint4& it : accesses) {
      const uint32_t x = __shfl_sync(kFullWarp, it.x, kLast);
      const uint32_t y = __shfl_sync(kFullWarp, it.y, kLast);
      const uint32_t z = __shfl_sync(kFullWarp, it.z, kLast);
      if (has_flag()) it.w = lane_id() < kLanesOfLine ? x : lane_id() < 2 * kLanesOfLine ? y : z;
    }
  }
};
static_assert(sizeof(uint4) == kSentAccess);
static_assert(sizeof(SentSlice) == 2 * kWarpSize * sizeof(uint4));
static_assert(kSentSlice == 2 * (kWarpSize - 1) && kWarpSize == 4 * LineSlice::kLanesOfLine);

// Slices that a warp waits for together: each of its lanes looks at one line's flag.
constexpr int kSlicesTogether = kWarpSize / LineSlice::kLanesOfLine;
__device__ inline int slice_of_lane() { return lane_id() / LineSlice::kLanesOfLine; }

// Waits for a line of the slice of so many bytes that the peer sends; none: null. Whole warp, where
// the eight lanes of slice_of_lane() have the same slice. False, for all lanes: one of them did not
// come.
[[gnu::noinline]] __device__ inline bool wait_for_lines(const Exchange& x, Session& s, Step step,
                                                        int peer, const SentSlice* slice,
                                                        int bytes) {
  const int line = lane_id() % LineSlice::kLanesOfLine;
  const auto* const flags = reinterpret_cast<const Word*>(slice) + line * 16 + 15;
  const bool came =
      slice == nullptr || line >= LineSlice::lines(bytes) ||
      wait_until(x, s, step, peer, [&] { return has_arrived(load_word(flags), s.epoch[peer]); });
  return __all_sync(kFullWarp, came);
}

// Where this rank's slices go on the peer, and the peer's come here.
__device__ inline SentSlice* slices_to(const Exchange& x, const Session& s, int peer) {
  return inbox_on(x, peer).slices[turn(s, peer)];
}
__device__ inline const SentSlice* slices_from(const Exchange& x, const Session& s, int peer) {
  return inbox_of(x, peer).slices[turn(s, peer)];
}

}  // namespace freeio::cuda
