// How a thread waits for a peer. Each wait is bounded, and ends early if the exchange fails.
#pragma once

#include "cuda/device/memory_order.cuh"
#include "cuda/device/words.cuh"
#include "cuda/params.h"

namespace freeio::cuda {

// Functions for rare events are not inlined. This makes small calls faster.

// Tells the peers of this exchange that this GPU makes no further one, in any lane.
[[gnu::noinline]] __device__ inline void tell_peers(const Exchange& x) {
  for (int rank = 0; rank < x.num_ranks; ++rank) {
    if (rank == x.rank) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      // Partner: the load in may_wait().
      store_release_system(&block_of_lane(x, rank, lane).has_given_up[x.gpu[x.rank]], 1);
    }
  }
}

// Ends the exchange with an error: records it, if it is this GPU's first, tells the peers, and ends
// the exchanges of the other lanes.
[[gnu::noinline]] __device__ inline void fail(const Exchange& x, CtaState& s, Step step, int peer,
                                              int word = 0, uint32_t expected = 0,
                                              uint32_t found = 0) {
  s.has_failed = 1;
  if (atomicExch(&self(x).has_failed, 1u) != 0) return;
  if (atomicExch(&block_of_lane(x, x.rank, 0).is_failure_recorded, 1u) != 0) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    atomicExch(&block_of_lane(x, x.rank, lane).has_failed, 1u);
  }
  Failure& failure = x.host->failure;
  failure.rank = x.rank;
  failure.peer = peer;
  failure.peer_gpu = x.gpu[peer];
  failure.word = word;
  failure.expected = expected;
  failure.found = found;
  failure.epoch = s.epoch[peer];
  failure.op = x.signature[kOp];
  fence_system();
  *const_cast<volatile int32_t*>(&failure.step) = step;
  tell_peers(x);
}

// Copies what the host block says to waiting threads into this GPU's memory. Only one of the
// threads that call this does so, once in a tick of about a millisecond. A load from the host's
// memory takes a microsecond, loads of one address queue up, and thousands of threads may wait for
// a late peer.
//
// If that thread has waited for long, since `begin`, it also shows its wait to the host. A wait
// that has reached the time-out is not shown, because it becomes a failure, which says more.
__device__ inline void look_at_host(const Exchange& x, uint64_t now, uint64_t begin, Step step,
                                    int peer) {
  GpuBlock& block = self(x);
  const auto tick = static_cast<uint32_t>(now >> 20);
  if (load_relaxed_device(&block.last_look) == tick) return;
  if (atomicExch(&block.last_look, tick) == tick) return;
  volatile HostBlock& host = *x.host;
  volatile GpuBlock& copy = block;
  // Partner: Peers::gone(), on the host.
  for (int rank = 0; rank < x.num_ranks; ++rank)
    copy.why_gone[x.gpu[rank]] = host.why_gone[x.gpu[rank]];
  const uint64_t timeout = host.timeout_ns;
  copy.timeout_ns = timeout;
  const uint64_t waited = now - begin;
  if (const uint64_t ticks = waited >> kWaitTick; ticks != 0 && waited <= timeout) {
    const uint32_t who = static_cast<uint32_t>(step) << 4 | x.signature[kOp] |
                         static_cast<uint32_t>(x.rank) << 8 | static_cast<uint32_t>(peer) << 16 |
                         static_cast<uint32_t>(x.gpu[peer]) << 24;
    host.wait[x.lane] = static_cast<uint64_t>(who) << 32 | static_cast<uint32_t>(ticks);
  }
}

// Whether a wait for the peer may go on. Returns when the wait began: `begin`, or now if that is 0.
// Returns 0 if the time is up, a rank has given up, or the peer's process is gone.
__device__ __forceinline__ uint64_t may_wait(const Exchange& x, CtaState& s, Step step, int peer,
                                             uint64_t begin) {
  if (load_relaxed_device(&self(x).has_failed) != 0) {
    s.has_failed = 1;
    return 0;
  }
  // Partner: the store in tell_peers().
  if (load_acquire_system(&self(x).has_given_up[x.gpu[peer]]) != 0) {
    fail(x, s, kPeerGaveUp, peer);
    return 0;
  }
  const uint64_t now = nanoseconds();
  if (begin == 0) begin = now;
  look_at_host(x, now, begin, step, peer);
  const volatile GpuBlock& copy = self(x);
  if (const uint32_t why_gone = copy.why_gone[x.gpu[peer]]; why_gone != 0) {
    fail(x, s, kPeerLost, peer, 0, 0, why_gone);
    return 0;
  }
  if (const uint64_t timeout = copy.timeout_ns; timeout != 0 && now - begin > timeout) {
    fail(x, s, step, peer);
    return 0;
  }
  return begin;
}

// Whether this GPU knows that the peer runs another call. Then the exchange ends with that error.
__device__ inline bool differs(const Exchange& x, CtaState& s, int peer) {
  const Mailbox& box = mailbox_from(x, s, peer);
#pragma unroll 1
  for (int word = 0; word < kSignatureWords; ++word) {
    const Word found = load_word(&box.signature[word]);
    if (!has_arrived(found, s.epoch[peer]) || value_of(found) == x.signature[word]) continue;
    fail(x, s, kSignatureDiffers, peer, word, x.signature[word], value_of(found));
    return true;
  }
  return false;
}

// A peer that differs may never send what is waited for.
[[gnu::noinline]] __device__ inline uint64_t may_wait_out_of_line(const Exchange& x, CtaState& s,
                                                                  Step step, int peer,
                                                                  uint64_t begin) {
  return differs(x, s, peer) ? 0 : may_wait(x, s, step, peer, begin);
}

// All waits for a peer go through this function. It polls `ready` until it holds. False: see
// may_wait(). `kInLoop`: for a loop that needs all registers, so that it cannot call functions.
// There the signatures have been compared already.
template <bool kInLoop = false, typename Ready>
__device__ bool wait_until(const Exchange& x, CtaState& s, Step step, int peer,
                           const Ready& ready) {
  constexpr int kPollsBetweenChecks = 1024;
  for (uint64_t begin = 0;;) {
#pragma unroll 1
    for (int poll = 0; poll < kPollsBetweenChecks; ++poll) {
      if (ready()) return true;
    }
    begin =
        kInLoop ? may_wait(x, s, step, peer, begin) : may_wait_out_of_line(x, s, step, peer, begin);
    if (begin == 0) return false;
  }
}

// Waits for a word of this exchange; `word` is a value that was loaded from it before.
__device__ inline bool wait_word(const Exchange& x, CtaState& s, Step step, int peer,
                                 const Word* address, Word& word) {
  if (has_arrived(word, s.epoch[peer])) return true;
  return wait_until(x, s, step, peer, [&] {
    word = load_word(address);
    return has_arrived(word, s.epoch[peer]);
  });
}

}  // namespace freeio::cuda
