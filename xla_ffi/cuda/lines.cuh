// Rows of small calls, as they are sent: in lines of 128 bytes, the last eight of which say that the
// others are there. So no flag of its own follows them, and no fence waits for them, for a
// fifteenth more bytes.
#pragma once

#include "cuda/session.cuh"

namespace freeio::cuda {

// A slice is 60 accesses of 16 bytes in eight lines, which a warp stores as two halves: of each
// half, every eighth lane has a flag in its second eight bytes. Its first access is in the first
// halves of both; it has no second one.
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

  // To a peer. Whole warp.
  __device__ void send(SentSlice& slice, uint32_t epoch) const {
    const bool flag = has_flag();
    const uint4 &a = accesses[0], &b = accesses[1];
    uint4* const parts = reinterpret_cast<uint4*>(&slice) + lane_id();
    // Partner: the loads in receive() on the peer.
    store_line(parts, flag ? uint4{a.x, a.y, epoch, 0} : a);
    store_line(parts + kWarpSize, flag ? uint4{a.z, a.w, epoch, 0} : b);
  }

  // Waits for what the peer has sent. Whole warp. False, for all lanes: it did not come.
  __device__ bool receive(const Exchange& x, Session& s, Step step, int peer,
                          const SentSlice& slice) {
    const uint4* const parts = reinterpret_cast<const uint4*>(&slice) + lane_id();
    const bool flag = has_flag();
    const uint32_t epoch = s.epoch[peer];
    while (true) {
      // Partner: the stores in send() on the peer.
      const uint4 a = load_line(parts);
      const uint4 b = load_line(parts + kWarpSize);
      const bool here = !flag || (a.z == epoch && b.z == epoch);
      accesses[0] = flag ? uint4{a.x, a.y, b.x, b.y} : a;
      accesses[1] = b;
      if (__all_sync(kFullWarp, here)) return true;
      const uint32_t* const missing = &parts[a.z == epoch ? kWarpSize : 0].z;
      const bool came = here || wait_until(x, s, step, peer, [&] {
                          return load_acquire_system(missing) == epoch;
                        });
      if (!__all_sync(kFullWarp, came)) return false;
    }
  }
};
static_assert(sizeof(uint4) == kSentAccess);
static_assert(sizeof(SentSlice) == 2 * kWarpSize * sizeof(uint4));
static_assert(kSentSlice == 2 * kWarpSize - kWarpSize / LineSlice::kLanesOfLine);

// Where this rank's slices go on the peer, and the peer's come here.
__device__ inline SentSlice* slices_to(const Exchange& x, const Session& s, int peer) {
  return x.control[peer]->slices[x.gpu[x.rank]][turn(s, peer)];
}
__device__ inline const SentSlice* slices_from(const Exchange& x, const Session& s, int peer) {
  return self(x).slices[x.gpu[peer]][turn(s, peer)];
}

}  // namespace freeio::cuda
