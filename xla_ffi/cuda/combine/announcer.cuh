// How a CTA raises flags on the peers when its data has arrived there.
#pragma once

#include "cuda/device/waits.cuh"

namespace freeio::cuda {

// A peer must not see a flag before the data that it stands for. To ensure this, a thread waits
// until everything stored before has arrived. That takes microseconds if the link is busy. So one
// warp of the CTA does only this, each time for everything that the other warps have stored
// meanwhile, and the other warps go on. An Announcer lies in shared memory.
class Announcer {
 public:
  // All threads; a barrier must follow.
  __device__ void begin() {
    if (threadIdx.x < kEntries) entries_[threadIdx.x].flag = 0;
    if (threadIdx.x == 0) num_added_ = 0;
  }

  // Gives the flag this value when everything that this warp has stored before has arrived. Whole
  // warp.
  __device__ void announce(uint32_t* flag, uint32_t value) {
    __syncwarp();
    if (lane_id() == 0) add(reinterpret_cast<uint64_t>(flag), value);
  }

  // This warp will announce no more. Whole warp.
  __device__ void leave() {
    __syncwarp();
    if (lane_id() == 0) add(kNoMore, 0);
  }

  // Raises flags until `warps` other warps have left. Whole warp.
  __device__ void run(int warps) {
    for (uint32_t taken = 0; warps > 0;) {
      // Only one lane polls, to make few accesses to shared memory.
      while (lane_id() == 0 && load_acquire_block(&entries_[taken % kEntries].flag) == 0) {
      }
      __syncwarp();
      Entry& entry = entries_[(taken + lane_id()) % kEntries];
      const uint64_t flag = load_acquire_block(&entry.flag);
      // Entries are taken in order, so nothing of a warp comes after the entry by which it leaves.
      const uint32_t gaps = ~__ballot_sync(kFullWarp, flag != 0);
      const int count = gaps == 0 ? kWarpSize : __ffs(static_cast<int>(gaps)) - 1;
      fence_system();
      const bool takes = lane_id() < count;
      if (takes) {
        const uint32_t value = entry.value;
        store_release_block(&entry.flag, 0);
        // Partner: load_acquire_system on the peer.
        if (flag != kNoMore) store_relaxed_system(reinterpret_cast<uint32_t*>(flag), value);
      }
      warps -= __popc(__ballot_sync(kFullWarp, takes && flag == kNoMore));
      taken += count;
    }
  }

 private:
  static constexpr int kEntries = 64;
  static constexpr uint64_t kNoMore = 1;
  static_assert(kEntries >= kWarpSize && (kEntries & (kEntries - 1)) == 0);

  struct Entry {
    uint64_t flag;  // its address; 0: there is none
    uint32_t value;
  };

  __device__ void add(uint64_t flag, uint32_t value) {
    Entry& entry = entries_[atomicAdd(&num_added_, 1u) % kEntries];
    // The entry becomes free soon, because the warp that takes it waits for no other warp.
    while (load_acquire_block(&entry.flag) != 0) {
    }
    entry.value = value;
    store_release_block(&entry.flag, flag);
  }

  Entry entries_[kEntries];
  uint32_t num_added_;
};

}  // namespace freeio::cuda
