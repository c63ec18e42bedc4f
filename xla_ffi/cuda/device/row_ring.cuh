// Slices of rows on their way to shared memory, for all warps of a CTA.
//
// One warp fetches: it goes through the items of the CTA's work in order, starts a bulk copy of
// every row of an item into the next free slot, and puts the item into a queue. The other warps
// take items from the queue, wait for the rows of each, and release their slots. So the rows of
// many items are on their way, however long a warp takes for one, and it costs a warp few
// instructions to get a row.
#pragma once

#include "cuda/device/async_copy.cuh"
#include "cuda/device/memory_order.cuh"
#include "cuda/device/shares.cuh"
#include "cuda/geometry.h"

namespace freeio::cuda {

// A sum over rows, or another use of them: what the warps do one after the other.
struct RowItem {
  int unit = -1;      // -1: there are no more
  int rank = 0;       // whose token it is
  int first = 0;      // of the token's assignments in the tile
  uint32_t mask = 0;  // of those whose rows are here
  int slot = 0;       // of the first row; the others follow
  uint32_t phase = 0;
};

// Lies in shared memory, in front of the slots.
struct alignas(16) RowRing {
  static constexpr int kEntries = 2 * kMaxRingSlots;
  // In the low bits of an entry's tag.
  static constexpr int kSlotBits = 8;

  // An item in the queue. It is there when its tag has the item's number.
  struct Entry {
    uint64_t tag;
    int unit;
    int rank;
    int first;
    uint32_t mask;
  };

  Entry entries[kEntries];
  CopyBarrier full[kMaxRingSlots];   // the slot's row is there
  CopyBarrier empty[kMaxRingSlots];  // the slot may be filled again
  uint32_t num_taken;                // items

  __device__ std::byte* slots() { return reinterpret_cast<std::byte*>(this + 1); }

  // All threads; a barrier must follow.
  __device__ void begin() {
    for (int i = static_cast<int>(threadIdx.x); i < kEntries; i += kThreads) entries[i].tag = 0;
    if (threadIdx.x < kMaxRingSlots) {
      full[threadIdx.x].begin();
      empty[threadIdx.x].begin();
    }
    if (threadIdx.x == 0) num_taken = 0;
    publish_barriers();
  }

  // The next item. Whole warp.
  __device__ RowItem take() {
    uint32_t number = 0;
    if (lane_id() == 0) number = atomicAdd(&num_taken, 1u);
    number = __shfl_sync(kFullWarp, number, 0);
    Entry& entry = entries[number % kEntries];
    uint64_t tag;
    do {
      // The fetching warp waits for no other thing than slots, which become free in the order of
      // items. Partner: the store in put().
      tag = load_acquire_block(&entry.tag);
    } while (tag >> 32 != number + 1);
    RowItem item;
    item.unit = entry.unit;
    item.rank = entry.rank;
    item.first = entry.first;
    item.mask = entry.mask;
    item.slot = static_cast<int>(tag & ((1u << kSlotBits) - 1));
    item.phase = static_cast<uint32_t>(tag >> kSlotBits) & 1;
    return item;
  }

  // One lane.
  __device__ void put(uint32_t number, const RowItem& item) {
    Entry& entry = entries[number % kEntries];
    entry.unit = item.unit;
    entry.rank = item.rank;
    entry.first = item.first;
    entry.mask = item.mask;
    store_release_block(&entry.tag, uint64_t{number + 1} << 32 | item.phase << kSlotBits |
                                        static_cast<uint32_t>(item.slot));
  }
};

// The slots and how far a warp has come in them.
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;

  __device__ void advance(int by, int num_slots) {
    slot += by;
    if (slot < num_slots) return;
    slot -= num_slots;
    phase ^= 1;
  }
};

// Lanes of an item that can have so many rows.
__device__ inline int lanes_of(int rows) {
  int lanes = 1;
  while (lanes < rows) lanes *= 2;
  return lanes;
}

// What the fetching warp knows.
struct RowFetcher {
  RowRing& ring;
  int slot_bytes;
  int num_slots;  // at least a warp's lanes
  RingPlace next = {};
  uint32_t num_put = 0;  // items

  // A slice to copy. Without bytes its slot stays as it is.
  struct Source {
    const void* from = nullptr;
    uint32_t bytes = 0;
  };

  // Fetches all items of a tile, and then tells each of the `warps` that take items that there are
  // no more. Whole warp. `lanes`: of an item, a power of two, one for each row that it can have.
  // Work has
  //   find(number): the item of this number, without its rows; its unit is -1 if there is none
  //   has_row(item, k): whether it has the k-th of its rows
  //   source(item, k): the slice of the k-th row; without bytes, rows need no slots
  //   has_lead(item): whether it has a slot in front of its rows; else it needs a row, or it is
  //     left out. So the queue is never longer than the ring.
  //   lead(item): the slice for that slot
  template <typename Work>
  __device__ void run(CtaState& s, int items, int lanes, int warps, const Work& work) {
    const int lane = lane_id() % lanes;
    const int first_lane = lane_id() - lane;
    const uint32_t of_item = (lanes == kWarpSize ? ~0u : (1u << lanes) - 1) << first_lane;
    const uint32_t before = (1u << lane_id()) - 1;
    // Items that the lanes look at together. They take each slot at most once. Else a lane could
    // not tell by its slot's phase whether the slot's use before was over, or that before it.
    const int together = min(kWarpSize / lanes, num_slots / (lanes + 1));
    const bool looks = lane_id() / lanes < together;
    for (int begin = 0; begin < items && !__any_sync(kFullWarp, has_failed(s)); begin += together) {
      RowItem item;
      const int number = begin + lane_id() / lanes;
      if (looks && number < items) item = work.find(number);
      const bool is_row = item.unit >= 0 && work.has_row(item, lane);
      item.mask = (__ballot_sync(kFullWarp, is_row) & of_item) >> first_lane;
      const bool is_lead = item.unit >= 0 && lane == 0 && work.has_lead(item);
      const Source row = is_row ? work.source(item, lane) : Source{};
      const uint32_t leads = __ballot_sync(kFullWarp, is_lead);
      const uint32_t rows = __ballot_sync(kFullWarp, row.bytes > 0);
      // The item's slots begin behind those of the items before it.
      const uint32_t earlier = (1u << first_lane) - 1;
      RingPlace first = next;
      first.advance(__popc(leads & earlier) + __popc(rows & earlier), num_slots);
      RingPlace place = first;
      place.advance(__popc(leads & of_item) + __popc(rows & of_item & before), num_slots);
      item.slot = first.slot;
      item.phase = first.phase;
      const uint32_t candidates = ((leads & of_item) != 0 ? leads : rows) & of_item;
      const bool puts = __ffs(static_cast<int>(candidates)) == lane_id() + 1;
      const uint32_t putting = __ballot_sync(kFullWarp, puts);
      bool waits_for_first = is_lead;
      bool waits = row.bytes > 0;
      while (__any_sync(kFullWarp, waits_for_first || waits)) {
        bool put = false;
        if (waits_for_first && is_free(first)) {
          start(first, work.lead(item));
          waits_for_first = false;
          put = puts;
        }
        if (waits && is_free(place)) {
          start(place, row);
          waits = false;
          put |= puts && !is_lead;
        }
        if (put) ring.put(num_put + __popc(putting & before), item);
      }
      next.advance(__popc(leads) + __popc(rows), num_slots);
      num_put += __popc(putting);
    }
    if (lane_id() < warps) ring.put(num_put + lane_id(), RowItem{});
    num_put += warps;
  }

 private:
  // The slot's use before this one has the other phase.
  __device__ bool is_free(const RingPlace& place) const {
    return ring.empty[place.slot].has_ended(place.phase ^ 1);
  }
  __device__ void start(const RingPlace& place, const Source& source) const {
    if (source.bytes > 0) {
      ring.full[place.slot].copy(ring.slots() + place.slot * slot_bytes, source.from, source.bytes);
    } else {
      ring.full[place.slot].arrive();
    }
  }
};

// The rows of an item, as the warp that took it sees them.
struct RowsInRing {
  RowRing& ring;
  int slot_bytes;
  int num_slots;
  RingPlace place;

  __device__ RowsInRing(RowRing& its_ring, int bytes, int count, const RowItem& item)
      : ring(its_ring), slot_bytes(bytes), num_slots(count) {
    place.slot = item.slot;
    place.phase = item.phase;
  }

  // The next row, when it is there.
  __device__ const std::byte* wait() const {
    while (!ring.full[place.slot].has_ended(place.phase)) {
    }
    return ring.slots() + place.slot * slot_bytes;
  }
  // Lets the slot be filled again, after all lanes have loaded what they need. Whole warp.
  __device__ void release() {
    __syncwarp();
    if (lane_id() == 0) ring.empty[place.slot].arrive();
    place.advance(1, num_slots);
  }
};

}  // namespace freeio::cuda
