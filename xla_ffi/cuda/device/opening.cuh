// How a kernel opens its exchange: epochs, signatures, and where the peers' buffers are.
#pragma once

#include "cuda/device/rank_set.cuh"
#include "cuda/device/stamps.cuh"
#include "cuda/device/waits.cuh"
#include "cuda/params.h"

namespace freeio::cuda {

// What a kernel loads first of all: each value by a thread of another warp, so that all are on
// their way together, and the thread can load something else before it looks at them.
struct Opening {
  // The first threads load the epochs, these the other values.
  static constexpr int kFailure = kRanksPerLane * kWarpSize;
  static constexpr int kDevice = kFailure + kWarpSize;
  static constexpr int kFirstRegions = kDevice + kWarpSize;
  static_assert(kFirstRegions + kMaxRanks <= kThreads);

  uint64_t value = 0;

  __device__ explicit Opening(const Exchange& x) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < x.num_ranks) value = self(x).epoch[x.gpu[thread]];
    if (thread == kFailure) value = load_relaxed_device(&self(x).has_failed);
    if (thread == kDevice) value = *x.device;
    if (const int rank = thread - kFirstRegions; rank >= 0 && rank < x.num_ranks) {
      value = load_word(&self(x).region_base[x.gpu[rank]][kFirstRegion]);
    }
  }
};

// First phase of every kernel. False, for all threads: the engine has failed before, or this is not
// the device that the host took it for.
__device__ inline bool open(const Exchange& x, CtaState& s, const Opening& loaded) {
  begin_timeline(s);
  const int thread = static_cast<int>(threadIdx.x);
  const auto value = static_cast<uint32_t>(loaded.value);
  bool wrong = false;
  // Never 0: what was never written must not count as arrived. Even after odd.
  if (thread < x.num_ranks) s.epoch[thread] = value + 1 == 0 ? 2 : value + 1;
  if (thread == Opening::kFailure) {
    s.has_failed = value;
    wrong = value != 0;
  }
  if (thread == Opening::kDevice) {
    s.device = value;
    wrong = value != x.expected_device;
  }
  if (const int rank = thread - Opening::kFirstRegions; rank >= 0 && rank < x.num_ranks) {
    s.first_region[rank] = loaded.value;
  }
  if (!__syncthreads_or(wrong)) return true;
  if (thread == 0 && s.has_failed == 0) {
    fail(x, s, kWrongDevice, x.rank, 0, x.expected_device, s.device);
  }
  return false;
}

// Posts the address of one of this rank's buffers to every peer. The buffer must be ready for the
// peers. One thread.
__device__ inline void post_address(const Exchange& x, const CtaState& s, int slot) {
  const uint64_t address = x.posted[slot];
#pragma unroll 1
  for (int rank = 0; rank < x.num_ranks; ++rank) {
    if (rank == x.rank) continue;
    Word* words = mailbox_to(x, s, rank).address[slot];
    store_word(&words[0], make_word(s.epoch[rank], static_cast<uint32_t>(address)));
    store_word(&words[1], make_word(s.epoch[rank], static_cast<uint32_t>(address >> 32)));
  }
}

// Posts to every peer the signature, and the addresses of the buffers in `slots` (one bit for
// each). The buffers must be ready for the peers. All threads of one CTA. The last threads send a
// word each, so that the first ones can send something else before.
__device__ inline void post(const Exchange& x, const CtaState& s, uint32_t slots) {
  constexpr int kWords = kSignatureWords + 2 * kMaxAddresses;
  for (int i = kThreads - 1 - static_cast<int>(threadIdx.x); i < kWords * x.num_ranks;
       i += kThreads) {
    const int rank = i / kWords;
    const int word = i % kWords;
    if (rank == x.rank) continue;
    Mailbox& box = mailbox_to(x, s, rank);
    if (word < kSignatureWords) {
      store_word(&box.signature[word], make_word(s.epoch[rank], x.signature[word]));
      continue;
    }
    const int slot = (word - kSignatureWords) / 2;
    const int half = (word - kSignatureWords) % 2;
    if ((slots >> slot & 1) == 0) continue;
    const auto value = static_cast<uint32_t>(x.posted[slot] >> (half * 32));
    store_word(&box.address[slot][half], make_word(s.epoch[rank], value));
  }
}

// The address here of what `rank` has posted.
__device__ inline uint64_t to_local_address(const Exchange& x, const CtaState& s, int rank,
                                            uint64_t posted) {
  const auto region = static_cast<uint32_t>(posted >> kRegionShift);
  if (region == 0) return posted;
  // Once set, an entry stays; the first is mostly there before the kernel begins.
  uint64_t base = region == kFirstRegion ? s.first_region[rank] : 0;
  if (base == 0) base = load_word(&self(x).region_base[x.gpu[rank]][region % kMaxRegions]);
  return base + (posted & ((uint64_t{1} << kRegionShift) - 1));
}

// Waits for the peers' signatures, compares them, and takes the addresses of `slots` (one bit for
// each). All threads. The last threads wait for a word each, so that the first ones can wait for
// something else before. If it has waited for an address, the CTA may then read everything that the
// peers' programs had computed before this exchange. False, for all threads: this or an earlier
// wait of the CTA has failed.
__device__ inline bool receive_addresses(const Exchange& x, CtaState& s, uint32_t slots) {
  constexpr int kWords = kSignatureWords + kMaxAddresses;
  for (int i = kThreads - 1 - static_cast<int>(threadIdx.x); i < kWords * x.num_ranks;
       i += kThreads) {
    const int rank = i / kWords;
    const int word = i % kWords;
    if (rank == x.rank) continue;
    const Mailbox& box = mailbox_from(x, s, rank);
    if (word < kSignatureWords) {
      // A peer may have posted all this and given up afterwards. Then XLA may have reused its
      // buffers. Partner: the store in tell_peers().
      const uint32_t aborted = load_relaxed_device(&self(x).has_given_up[x.gpu[rank]]);
      Word found = load_word(&box.signature[word]);
      if (aborted != 0) {
        fail(x, s, kPeerGaveUp, rank);
        break;
      }
      if (!wait_word(x, s, kWaitSignature, rank, &box.signature[word], found)) break;
      if (value_of(found) != x.signature[word]) {
        fail(x, s, kSignatureDiffers, rank, word, x.signature[word], value_of(found));
        break;
      }
    } else if (const int slot = word - kSignatureWords; slots >> slot & 1) {
      // Both loads are on their way together.
      Word low = load_word(&box.address[slot][0]);
      Word high = 0;
      const bool arrived = wait_until(x, s, kWaitAddress, rank, [&] {
        // Partner: the fence before the peer's store_word, or the start of the peer's kernel.
        high = load_acquire_word(&box.address[slot][1]);
        return has_arrived(high, s.epoch[rank]);
      });
      if (!arrived || !wait_word(x, s, kWaitAddress, rank, &box.address[slot][0], low)) break;
      s.address[rank][slot] =
          to_local_address(x, s, rank, static_cast<uint64_t>(value_of(high)) << 32 | value_of(low));
    }
  }
  // Each thread looks before the barrier, and a thread that has failed sees that itself. After the
  // barrier, a thread could see the failure of one that is already further on, and return alone.
  return !__syncthreads_or(has_failed(s));
}

}  // namespace freeio::cuda
