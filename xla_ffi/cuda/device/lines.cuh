// How small calls send rows: in lines of 128 bytes. The last eight bytes of a line say that the
// others have arrived. So no separate flag follows a row, and no fence waits for it. The price is
// a fifteenth more bytes.
#pragma once

#include "cuda/device/rows.cuh"
#include "cuda/device/waits.cuh"

namespace freeio::cuda {

// How a lane accesses 16 bytes of a row that ends after `bytes`, which may be fewer.

// For rows whose size and address are multiples of 16 bytes.
struct InWhole {
  __device__ static uint4 load(const std::byte* from, int) {
    return *reinterpret_cast<const uint4*>(from);
  }
  __device__ static void store(uint4 value, std::byte* to, int) {
    *reinterpret_cast<uint4*>(to) = value;
  }
};

// For rows whose size and address are multiples of a part's size. Bytes beyond the end of the row
// are zero in the slice. Each part has a kernel of its own: at small sizes a switch between them
// would take longer than the accesses.
template <typename Part>
struct InParts {
  static constexpr int kParts = sizeof(uint4) / sizeof(Part);

  __device__ static uint4 load(const std::byte* from, int bytes) {
    Part parts[kParts] = {};
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i * static_cast<int>(sizeof(Part)) < bytes) {
        parts[i] = reinterpret_cast<const Part*>(from)[i];
      }
    }
    uint4 value;
    memcpy(&value, parts, sizeof(value));
    return value;
  }
  __device__ static void store(uint4 value, std::byte* to, int bytes) {
    Part parts[kParts];
    memcpy(parts, &value, sizeof(value));
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i * static_cast<int>(sizeof(Part)) < bytes) reinterpret_cast<Part*>(to)[i] = parts[i];
    }
  }
};

// A slice is 60 accesses of 16 bytes, in eight lines. A warp stores them as two halves of four
// lines, 16 bytes for each lane and half. In both halves every eighth lane stores a flag in its
// last eight bytes. So such a lane has one access, of which each half takes eight bytes. Other
// lanes have two.
struct LineSlice {
  static constexpr int kLanesOfLine = 8;
  static constexpr int kAccess = kSentAccess;
  static constexpr int kNone = 1 << 24;

  uint4 accesses[2] = {};  // of this lane

  __device__ static bool has_flag() { return lane_id() % kLanesOfLine == kLanesOfLine - 1; }

  // Which accesses of the slice are this lane's.
  __device__ static int place(int access) {
    if (access == 0) return lane_id();
    return has_flag() ? kNone : kWarpSize + lane_id() - lane_id() / kLanesOfLine;
  }

  // Of a row that `Access` can access.
  template <typename Access>
  __device__ void load(const std::byte* from, int bytes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int offset = place(i) * kAccess;
      if (offset >= bytes) continue;
      accesses[i] = Access::load(from + offset, bytes - offset);
    }
  }

  // To the rows that `row` names in the lanes of `mask`. Whole warp.
  template <typename Access>
  __device__ void store(std::byte* rows, int64_t row_bytes, int bytes, int row,
                        uint32_t mask) const {
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1) {
      const int64_t to = __shfl_sync(kFullWarp, row, __ffs(static_cast<int>(mask)) - 1);
      std::byte* const target = rows + to * row_bytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int offset = place(i) * kAccess;
        if (offset >= bytes) continue;
        Access::store(accesses[i], target + offset, bytes - offset);
      }
    }
  }

  // To a peer. Whole warp.
  __device__ void send(SentSlice& slice, uint32_t epoch) const {
    const bool flag = has_flag();
    const uint4 &a = accesses[0], &b = accesses[1];
    uint4* const parts = reinterpret_cast<uint4*>(&slice) + lane_id();
    // Partner: the loads in start() on the peer.
    store_line(parts, flag ? uint4{a.x, a.y, epoch, 0} : a);
    store_line(parts + kWarpSize, flag ? uint4{a.z, a.w, epoch, 0} : b);
  }

  // Loads what the peer sends, whether it is there yet or not. Whole warp.
  __device__ void start(const SentSlice& slice) {
    const uint4* const parts = reinterpret_cast<const uint4*>(&slice) + lane_id();
    // Partner: the stores in send() on the peer.
    accesses[0] = load_line(parts);
    accesses[1] = load_line(parts + kWarpSize);
  }

  // Whether the lane's parts of what start() has loaded were there, as far as it can see.
  __device__ bool is_here(uint32_t epoch) const {
    return !has_flag() || (accesses[0].z == epoch && accesses[1].z == epoch);
  }

  // Replaces the flags by the row's bytes, once all lanes' parts are there.
  __device__ void take() {
    if (!has_flag()) return;
    accesses[0].z = accesses[1].x;
    accesses[0].w = accesses[1].y;
  }
};
static_assert(sizeof(uint4) == kSentAccess);
static_assert(sizeof(SentSlice) == 2 * kWarpSize * sizeof(uint4));
static_assert(kSentSlice == 2 * kWarpSize - kWarpSize / LineSlice::kLanesOfLine);

// Slices that a warp waits for together: each of its lanes looks at one line's flag.
constexpr int kSlicesTogether = kWarpSize / LineSlice::kLanesOfLine;
__device__ inline int slice_of_lane() { return lane_id() / LineSlice::kLanesOfLine; }

// Each lane waits for one line of the slice that the peer sends; null: it does not wait. Whole
// warp. The eight lanes with the same slice_of_lane() have the same slice. False, for all lanes: a
// line did not come.
[[gnu::noinline]] __device__ inline bool wait_for_lines(const Exchange& x, CtaState& s, Step step,
                                                        int peer, const SentSlice* slice) {
  const int line = lane_id() % LineSlice::kLanesOfLine;
  const auto* const flags = reinterpret_cast<const Word*>(slice) + line * 16 + 15;
  const bool came = slice == nullptr || wait_until(x, s, step, peer, [&] {
                      return value_of(load_word(flags)) == s.epoch[peer];
                    });
  return __all_sync(kFullWarp, came);
}

// Where this rank's slices lie on the peer, and the peer's slices here.
__device__ inline SentSlice* slices_to(const Exchange& x, const CtaState& s, int peer) {
  return inbox_to(x, peer).slices[turn(s, peer)];
}
__device__ inline const SentSlice* slices_from(const Exchange& x, const CtaState& s, int peer) {
  return inbox_from(x, peer).slices[turn(s, peer)];
}

}  // namespace freeio::cuda
