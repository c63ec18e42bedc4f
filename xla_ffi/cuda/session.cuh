// One exchange as its CTAs see it: opening, bounded waits, mailboxes, and the end.
#pragma once

#include "cuda/control.h"
#include "cuda/memory_order.cuh"

namespace freeio::cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// One of several CTAs that do something together.
struct Share {
  uint32_t number;
  uint32_t of;
};

// What the threads of one CTA share of its exchange.
struct Session {
  uint32_t epoch[kMaxRanks];                   // of this exchange, with each rank
  uint64_t address[kMaxRanks][kMaxAddresses];  // of each rank's buffers
  uint64_t first_region[kMaxRanks];            // of each rank's process: where it is seen here
  uint32_t failed;
  uint32_t device;     // this device's index in the mesh
  uint32_t next_item;  // of the CTA's work
  Share share;         // of the results of a failed exchange

  template <typename T>
  __device__ T* buffer(int rank, int slot) const {
    return reinterpret_cast<T*>(address[rank][slot]);
  }
};

__device__ inline bool has_failed(const Session& s) {
  return *const_cast<const volatile uint32_t*>(&s.failed) != 0;
}

__device__ inline ControlBlock& self(const Exchange& x) { return *x.control[x.rank]; }

__device__ inline Word make_word(uint32_t epoch, uint32_t value) {
  return static_cast<Word>(epoch) << 32 | value;
}
__device__ inline bool has_arrived(Word word, uint32_t epoch) { return word >> 32 == epoch; }
__device__ inline uint32_t value_of(Word word) { return static_cast<uint32_t>(word); }

// Which of two things that are used by turns is this exchange's with the peer.
__device__ inline uint32_t turn(const Session& s, int peer) { return s.epoch[peer] % 2; }

// The mailbox on the peer that this rank writes, and the one here that the peer writes.
__device__ inline Mailbox& mailbox_to(const Exchange& x, const Session& s, int peer) {
  return x.control[peer]->mailbox[x.gpu[x.rank]][turn(s, peer)];
}
__device__ inline Mailbox& mailbox_from(const Exchange& x, const Session& s, int peer) {
  return self(x).mailbox[x.gpu[peer]][turn(s, peer)];
}

// Functions of what hardly ever happens are not inlined: calls with few tokens, in which nothing is
// done often, are faster for it.

// Ends the exchange with an error: records it, if it is this GPU's first, and tells the peers.
[[gnu::noinline]] __device__ inline void fail(const Exchange& x, Session& s, Step step, int peer,
                                              int word = 0, uint32_t expected = 0,
                                              uint32_t found = 0) {
  s.failed = 1;
  if (atomicExch(&self(x).failed, 1u) != 0) return;
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
  for (int rank = 0; rank < x.num_ranks; ++rank) {
    // Partner: the load in may_wait().
    if (rank != x.rank) store_release_system(&x.control[rank]->aborted[x.gpu[x.rank]], 1);
  }
}

// Copies what the host tells those who wait to this GPU's memory. One of all threads that call it
// does so, once a tick of about a millisecond: a load from the host's memory takes a microsecond,
// and those of one address queue up. When every waiting thread looked there, as they all do where a
// peer is late, a kernel took 15 ms longer.
//
// That thread also shows the host for whom it has waited since `begin`, if that is long ago. At its
// end a wait becomes a failure, which tells more.
__device__ inline void look_at_host(const Exchange& x, uint64_t now, uint64_t begin, Step step,
                                    int peer) {
  ControlBlock& control = self(x);
  const auto tick = static_cast<uint32_t>(now >> 20);
  if (load_relaxed_device(&control.looked) == tick) return;
  if (atomicExch(&control.looked, tick) == tick) return;
  volatile HostBlock& host = *x.host;
  volatile ControlBlock& copy = control;
  // Partner: Peers::gone(), on the host.
  for (int rank = 0; rank < x.num_ranks; ++rank) copy.lost[x.gpu[rank]] = host.lost[x.gpu[rank]];
  const uint64_t timeout = host.timeout_ns;
  copy.timeout_ns = timeout;
  const uint64_t waited = now - begin;
  if (const uint64_t ticks = waited >> kWaitTick; ticks != 0 && waited <= timeout) {
    const uint32_t who = static_cast<uint32_t>(step) << 4 | x.signature[kOp] |
                         static_cast<uint32_t>(x.rank) << 8 | static_cast<uint32_t>(peer) << 16 |
                         static_cast<uint32_t>(x.gpu[peer]) << 24;
    host.wait = static_cast<uint64_t>(who) << 32 | static_cast<uint32_t>(ticks);
  }
}

// Whether a wait for the peer may go on, and since when it lasts: `begin` if that is not 0. 0: the
// time is up, a rank has given up, or the peer's process is there no more.
__device__ __forceinline__ uint64_t may_wait(const Exchange& x, Session& s, Step step, int peer,
                                             uint64_t begin) {
  if (load_relaxed_device(&self(x).failed) != 0) {
    s.failed = 1;
    return 0;
  }
  // Partner: the store in fail().
  if (load_acquire_system(&self(x).aborted[x.gpu[peer]]) != 0) {
    fail(x, s, kPeerGaveUp, peer);
    return 0;
  }
  const uint64_t now = nanoseconds();
  if (begin == 0) begin = now;
  look_at_host(x, now, begin, step, peer);
  const volatile ControlBlock& copy = self(x);
  if (const uint32_t lost = copy.lost[x.gpu[peer]]; lost != 0) {
    fail(x, s, kPeerLost, peer, 0, 0, lost);
    return 0;
  }
  if (const uint64_t timeout = copy.timeout_ns; timeout != 0 && now - begin > timeout) {
    fail(x, s, step, peer);
    return 0;
  }
  return begin;
}

// Whether the peer is known to run something else. Then the exchange ends with that error.
__device__ inline bool differs(const Exchange& x, Session& s, int peer) {
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
[[gnu::noinline]] __device__ inline uint64_t may_wait_out_of_line(const Exchange& x, Session& s,
                                                                  Step step, int peer,
                                                                  uint64_t begin) {
  return differs(x, s, peer) ? 0 : may_wait(x, s, step, peer, begin);
}

// The one wait: polls `ready` until it holds. False: see may_wait(). `kInLoop`: of a loop that
// needs all registers, of which a call would take some; the signatures have been compared there.
template <bool kInLoop = false, typename Ready>
__device__ bool wait_until(const Exchange& x, Session& s, Step step, int peer, const Ready& ready) {
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
__device__ inline bool wait_word(const Exchange& x, Session& s, Step step, int peer,
                                 const Word* address, Word& word) {
  if (has_arrived(word, s.epoch[peer])) return true;
  return wait_until(x, s, step, peer, [&] {
    word = load_word(address);
    return has_arrived(word, s.epoch[peer]);
  });
}

// The inbox on the peer that this rank writes, and the one here that the peer writes.
__device__ inline Inbox& inbox_to(const Exchange& x, int peer) {
  return x.control[peer]->inbox[x.gpu[x.rank]];
}
__device__ inline Inbox& inbox_from(const Exchange& x, int peer) {
  return self(x).inbox[x.gpu[peer]];
}

// What a kernel loads first of all: each value by a thread of another warp, so that all are on
// their way together, and the thread can load something else before it looks at them.
struct Opening {
  uint64_t value = 0;

  __device__ explicit Opening(const Exchange& x) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < x.num_ranks) value = self(x).epoch[x.gpu[thread]];
    if (thread == kWarpSize) value = load_relaxed_device(&self(x).failed);
    if (thread == 2 * kWarpSize) value = *x.device;
    if (const int rank = thread - 3 * kWarpSize; rank >= 0 && rank < x.num_ranks) {
      value = load_word(&self(x).region_base[x.gpu[rank]][kFirstRegion]);
    }
  }
};

// First phase of every kernel. False, for all threads: the engine has failed before, or this is not
// the device that the host took it for.
__device__ inline bool open(const Exchange& x, Session& s, const Opening& loaded) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto value = static_cast<uint32_t>(loaded.value);
  bool wrong = false;
  // Never 0: what was never written must not count as arrived. Even after odd.
  if (thread < x.num_ranks) s.epoch[thread] = value + 1 == 0 ? 2 : value + 1;
  if (thread == kWarpSize) {
    s.failed = value;
    wrong = value != 0;
  }
  if (thread == 2 * kWarpSize) {
    s.device = value;
    wrong = value != x.expected_device;
  }
  if (const int rank = thread - 3 * kWarpSize; rank >= 0 && rank < x.num_ranks) {
    s.first_region[rank] = loaded.value;
  }
  if (!__syncthreads_or(wrong)) return true;
  if (thread == 0 && s.failed == 0) {
    fail(x, s, kWrongDevice, x.rank, 0, x.expected_device, s.device);
  }
  return false;
}

// Tells every peer where this rank's buffer is. One thread; the buffer is ready for its use.
__device__ inline void post_address(const Exchange& x, const Session& s, int slot) {
  const uint64_t address = x.posted[slot];
#pragma unroll 1
  for (int rank = 0; rank < x.num_ranks; ++rank) {
    if (rank == x.rank) continue;
    Word* words = mailbox_to(x, s, rank).address[slot];
    store_word(&words[0], make_word(s.epoch[rank], static_cast<uint32_t>(address)));
    store_word(&words[1], make_word(s.epoch[rank], static_cast<uint32_t>(address >> 32)));
  }
}

// Tells every peer what this rank is about to run, and where the buffers in `slots` are (one bit
// for each), all of them ready for its use. All threads of one CTA, one for each word; the last
// ones, so that the first can send something else before.
__device__ inline void post(const Exchange& x, const Session& s, uint32_t slots) {
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

// Where this GPU sees what `rank` has posted.
__device__ inline uint64_t to_local_address(const Exchange& x, const Session& s, int rank,
                                            uint64_t posted) {
  const auto region = static_cast<uint32_t>(posted >> kRegionShift);
  if (region == 0) return posted;
  // Once set, an entry stays; the first is mostly there before the kernel begins.
  uint64_t base = region == kFirstRegion ? s.first_region[rank] : 0;
  if (base == 0) base = load_word(&self(x).region_base[x.gpu[rank]][region % kMaxRegions]);
  return base + (posted & ((uint64_t{1} << kRegionShift) - 1));
}

// Waits for the peers' signatures, compares them, and takes the addresses of `slots` (one bit for
// each). All threads; the last ones do it, so that the first can wait for something else before.
// After it, what the peers' programs had computed before this exchange may be read if there was an
// address to wait for. False, for all threads: this or an earlier wait of the CTA has failed.
__device__ inline bool receive_addresses(const Exchange& x, Session& s, uint32_t slots) {
  constexpr int kWords = kSignatureWords + kMaxAddresses;
  for (int i = kThreads - 1 - static_cast<int>(threadIdx.x); i < kWords * x.num_ranks;
       i += kThreads) {
    const int rank = i / kWords;
    const int word = i % kWords;
    if (rank == x.rank) continue;
    const Mailbox& box = mailbox_from(x, s, rank);
    if (word < kSignatureWords) {
      // A peer that has posted all this and then given up has its buffers no more. Partner: the
      // store in fail().
      const uint32_t aborted = load_relaxed_device(&self(x).aborted[x.gpu[rank]]);
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
  // A thread that has failed sees that itself. Who looked after the barrier could see the failure
  // of one that is already further on, and leave the others alone.
  return !__syncthreads_or(has_failed(s));
}

// This CTA reads its peers' buffers no more: says so, once in each kernel. (What combine stores
// later has arrival flags of its own, and whose it is waits for all of them.) CTA 0 waits until all
// CTAs of all ranks have said it, and closes the exchange. One warp. `kPublishes`: what the CTA has
// stored to its peers by now is there, too.
template <bool kPublishes>
__device__ void conclude(const Exchange& x, Session& s) {
  ControlBlock& control = self(x);
  const int rank = lane_id();
  if (__any_sync(kFullWarp, has_failed(s))) return;
  // Partner: the load below, of this GPU's CTA 0 and of the peers'.
  if (rank < x.num_ranks) {
    uint32_t* finished = &x.control[rank]->finished[x.gpu[x.rank]];
    if constexpr (kPublishes) {
      add_release_system(finished, 1);
    } else {
      add_relaxed_system(finished, 1);
    }
  }
  if (blockIdx.x != 0) return;
  const int gpu = x.gpu[rank < x.num_ranks ? rank : x.rank];
  const uint32_t end = control.ended[gpu] + gridDim.x;
  const bool ended =
      rank >= x.num_ranks || wait_until(x, s, kWaitFinish, rank, [&] {
        return static_cast<int32_t>(load_acquire_system(&control.finished[gpu]) - end) >= 0;
      });
  // Not before all have ended: a CTA of this GPU may yet have to look at the epochs.
  if (!__all_sync(kFullWarp, ended)) return;
  if (rank < x.num_ranks) {
    control.ended[gpu] = end;
    control.epoch[gpu] = s.epoch[rank];
  }
  if (rank == 0) control.prepared = 0;
}

// The same at the end of a kernel. All threads.
template <bool kPublishes>
__device__ void finish(const Exchange& x, Session& s) {
  __syncthreads();
  if (warp_id() == 0) conclude<kPublishes>(x, s);
}

// Beginning and end of an exchange in which no rank's kernel touches a buffer of another rank, or
// needs to know that one has ended: it ends by itself. Begin: all threads.
__device__ inline void begin_alone(const Exchange& x) {
  if (threadIdx.x == 0) count_around_device(&self(x).opened, gridDim.x - 1);
}
// All threads.
__device__ inline void finish_alone(const Exchange& x, Session& s) {
  if (blockIdx.x != 0 || warp_id() != kWarps - 1 || __any_sync(kFullWarp, has_failed(s))) return;
  ControlBlock& control = self(x);
  const int rank = lane_id();
  // Not before all CTAs have looked at the epochs.
  const bool opened = rank != 0 || wait_until(x, s, kWaitOwn, x.rank, [&] {
                        return load_relaxed_device(&control.opened) == 0;
                      });
  if (__all_sync(kFullWarp, opened) && rank < x.num_ranks)
    control.epoch[x.gpu[rank]] = s.epoch[rank];
}

// Fills a share of a failed exchange's result with ones: NaN, or -1, which nobody takes for data,
// and later calls not for a row. All threads.
__device__ inline void spoil(const Share& share, void* result, int64_t bytes) {
  if (result == nullptr) return;
  auto* words = static_cast<uint32_t*>(result);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(uint32_t));
  const int64_t step = static_cast<int64_t>(share.of) * kThreads;
  const int64_t begin = static_cast<int64_t>(share.number) * kThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t i = begin; i < count; i += step) words[i] = ~0u;
  auto* rest = static_cast<uint8_t*>(result) + count * sizeof(uint32_t);
  if (begin < bytes % static_cast<int64_t>(sizeof(uint32_t))) rest[begin] = 0xff;
}

// The share of this CTA, which knows of the failure, in spoiling the results. One thread. When it
// has it, no CTA stores to them any more.
[[gnu::noinline]] __device__ inline Share await_spoiling(const Exchange& x) {
  ControlBlock& control = self(x);
  // An earlier kernel failed: all CTAs know.
  if (load_relaxed_device(&control.spoiled) != 0) return {blockIdx.x, gridDim.x};
  const uint32_t number = atomicAdd(&control.failing, 1u);
  fence_system();
  count_around_device(&control.left, gridDim.x - 1);
  // Who does not know ends as always, who waits hears of it: both in bounded time. Bounded again,
  // in case that one of them is lost.
  const volatile HostBlock& host = *x.host;
  const uint64_t begin = nanoseconds();
  bool all = false;
  while (!all && nanoseconds() - begin <= 2 * host.timeout_ns) {
    constexpr int kPollsBetweenChecks = 1024;
    for (int poll = 0; !all && poll < kPollsBetweenChecks; ++poll) {
      all = load_relaxed_device(&control.left) == 0;
    }
  }
  fence_system();
  const uint32_t failing = load_relaxed_device(&control.failing);
  // What the others have stored last is on its way.
  sleep_microseconds<100>();
  atomicExch(&control.spoiled, 1u);
  return all ? Share{number, failing} : Share{blockIdx.x, gridDim.x};
}

// Last phase of every kernel. Where the exchange has failed, spoil_results(share) is called by all
// CTAs that know, when no other one stores results any more. All threads.
template <typename Spoil>
[[gnu::noinline]] __device__ void leave_failed(const Exchange& x, Session& s,
                                               const Spoil& spoil_results) {
  if (threadIdx.x == 0) s.share = await_spoiling(x);
  __syncthreads();
  spoil_results(s.share);
}
template <typename Spoil>
__device__ void leave(const Exchange& x, Session& s, const Spoil& spoil_results) {
  __syncthreads();
  if (has_failed(s)) return leave_failed(x, s, spoil_results);
  if (threadIdx.x == 0) count_around_device(&self(x).left, gridDim.x - 1);
}

}  // namespace freeio::cuda
