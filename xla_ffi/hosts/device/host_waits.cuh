// How a thread waits for a rank of another host, and what the ranks of other hosts learn of a
// failure. All such waits are bounded, as those of cuda/device/waits.cuh are.
#pragma once

#include "cuda/device/waits.cuh"
#include "cuda/failure_code.h"
#include "hosts/device/wire.cuh"
#include "hosts/params.h"

namespace freeio::cuda {

// What the threads of one CTA share of an exchange between hosts.
struct HostsState {
  uint32_t epoch[kMaxRanks];  // of this exchange, with each rank of the group
};

__device__ inline std::byte* own_landing(const Hosts& h) { return h.landing[h.local.rank]; }

// What a rank of the group writes here.
__device__ inline MailOfPe& mail_from(const Hosts& h, int rank) {
  return h.layout.mail_of_pe(own_landing(h), h.pe[rank]);
}
// The same for the ranks of another host that use this GPU as their rail.
__device__ inline MailOfHost& mail_from_host(const Hosts& h, int host) {
  return h.layout.mail_of_host(own_landing(h), h.host_number[host]);
}
// The place on another GPU for what this rank writes there. The address is this GPU's own.
__device__ inline MailOfPe& mail_to(const Hosts& h) {
  return h.layout.mail_of_pe(own_landing(h), h.pe[h.rank]);
}
__device__ inline MailOfHost& mail_to_host(const Hosts& h) {
  return h.layout.mail_of_host(own_landing(h), h.host_number[h.host]);
}

// What this rank writes on the GPU of a rank of its own host.
__device__ inline MailOfPe& mail_on(const Hosts& h, int rank) {
  return h.layout.mail_of_pe(h.landing[h.local_of[rank]], h.pe[h.rank]);
}

// Ends the exchange with an error that names a rank of another host.
[[gnu::noinline]] __device__ inline void fail_between_hosts(const Hosts& h, CtaState& s, Step step,
                                                            int peer, int word = 0,
                                                            uint32_t expected = 0,
                                                            uint32_t found = 0) {
  const FailureCode code{h.rank, h.host, peer, h.host_of[peer], word};
  fail(h.local, s, step, h.local.rank, code.packed(), expected, found);
}

// Whether a wait for a rank of another host may go on; as may_wait().
[[gnu::noinline]] __device__ inline uint64_t may_wait_for_host(const Hosts& h, CtaState& s,
                                                               Step step, int peer,
                                                               uint64_t begin) {
  GpuBlock& block = self(h.local);
  if (load_relaxed_device(&block.has_failed) != 0) {
    s.has_failed = 1;
    return 0;
  }
  // Partner: tell_hosts() on the peer. An exchange that comes after a failure is never waited for.
  if (Wire::has(Signal::kGaveUp, &mail_from(h, peer).has_given_up, 1)) {
    fail_between_hosts(h, s, kPeerGaveUp, peer);
    return 0;
  }
  const uint64_t now = nanoseconds();
  if (begin == 0) begin = now;
  // What a process has sent before it left may come later than the news that it has.
  constexpr uint64_t kLateNews = 1'000'000'000;
  const uint32_t why = load_acquire_system(&mail_from(h, peer).why_gone);
  if (why != 0 && now - begin > kLateNews) {
    fail_between_hosts(h, s, kPeerLost, peer, 0, 0, why);
    return 0;
  }
  look_at_host(h.local, now, now, step, h.local.rank);
  const volatile GpuBlock& copy = block;
  for (int rank = 0; rank < h.num_local(); ++rank) {
    // A rank of this host may be what the other host waits for.
    if (rank == h.local.rank) continue;
    if (load_acquire_system(&block.has_given_up[h.local.gpu[rank]]) != 0) {
      fail(h.local, s, kPeerGaveUp, rank);
      return 0;
    }
  }
  if (const uint64_t timeout = copy.timeout_ns; timeout != 0 && now - begin > timeout) {
    fail_between_hosts(h, s, step, peer);
    return 0;
  }
  return begin;
}

// As wait_until(), for a rank of another host.
template <typename Ready>
__device__ bool wait_for_host(const Hosts& h, CtaState& s, Step step, int peer,
                              const Ready& ready) {
  constexpr int kPollsBetweenChecks = 1024;
  for (uint64_t begin = 0;;) {
#pragma unroll 1
    for (int poll = 0; poll < kPollsBetweenChecks; ++poll) {
      if (ready()) return true;
    }
    begin = may_wait_for_host(h, s, step, peer, begin);
    if (begin == 0) return false;
  }
}

// Waits for other warps of this GPU. Their waits are bounded, so this one is, too, and the error is
// theirs: they know who is late.
template <typename Ready>
__device__ bool wait_for_own_warps(const Hosts& h, CtaState& s, const Ready& ready) {
  constexpr int kPollsBetweenChecks = 1024;
  while (true) {
#pragma unroll 1
    for (int poll = 0; poll < kPollsBetweenChecks; ++poll) {
      if (ready()) return true;
    }
    if (load_relaxed_device(&self(h.local).has_failed) == 0) continue;
    s.has_failed = 1;
    return false;
  }
}

// Tells the ranks of other hosts that this GPU makes no further exchange. One warp.
__device__ inline void tell_hosts(const Hosts& h) {
  for (int rank = lane_id(); rank < h.num_ranks; rank += kWarpSize) {
    if (h.is_here(rank)) continue;
    // Partner: may_wait_for_host().
    Wire::signal(Signal::kGaveUp, &mail_to(h).has_given_up, 1, h.pe[rank]);
  }
}

}  // namespace freeio::cuda
