// Headers: what each rank tells each other rank when an exchange begins. A dispatch needs the
// counts in them. In every operation they show that all ranks make the same call.
//
// A header goes straight to each rank, so that nobody has to pass it on.
#pragma once

#include "cuda/device/cta.cuh"
#include "hosts/device/host_waits.cuh"

namespace freeio::cuda {

// The epochs of the exchange. All threads; a barrier must follow.
__device__ inline void load_epochs(const Hosts& h, HostsState& hs) {
  const auto rank = static_cast<int>(threadIdx.x);
  if (rank >= h.num_ranks) return;
  const uint32_t last = mail_from(h, rank).epoch;
  hs.epoch[rank] = last + 1 == 0 ? 2 : last + 1;  // never 0, and even after odd
}

// The value of a signal of this exchange.
__device__ inline uint64_t stamp_of(uint32_t epoch, int number) {
  return static_cast<uint64_t>(epoch) << 32 | static_cast<uint32_t>(number + 1);
}

// The place for this rank's header on a rank of another host; null: only the network reaches it.
__device__ inline Header* header_on(const Hosts& h, int rank, uint32_t turn) {
  return Wire::direct(&mail_to(h).received[turn], h.pe[rank]);
}

// Sends this rank's header, with `num_counts` counts from shared memory, to every rank. All threads
// of one CTA.
//
// The network puts a header from memory of the pair, which the exchange after the next one
// overwrites. By then the peer has it: it ends no exchange without the headers of all ranks.
__device__ inline void send_headers(const Hosts& h, const HostsState& hs, const uint32_t* counts,
                                    int num_counts) {
  const int words = kSignatureWords + num_counts;
  for (int i = static_cast<int>(threadIdx.x); i < words * h.num_ranks; i += kThreads) {
    const int rank = i / words;
    const int word = i - rank * words;
    const uint32_t turn = hs.epoch[rank] % 2;
    Header* header = h.is_here(rank) ? &mail_on(h, rank).received[turn] : header_on(h, rank, turn);
    if (header == nullptr) header = &mail_from(h, rank).sent[turn];
    if (word < kSignatureWords) {
      header->signature[word] = h.local.signature[word];
    } else {
      header->counts[word - kSignatureWords] = counts[word - kSignatureWords];
    }
  }
  __syncthreads();
  for (int rank = warp_id(); rank < h.num_ranks; rank += kWarps) {
    const uint32_t turn = hs.epoch[rank] % 2;
    const uint64_t stamp = stamp_of(hs.epoch[rank], 0);
    // The network reads what all threads have written. And in a program that uses it, not every
    // version of its own fence need order what other threads have stored by links.
    if (!h.is_here(rank)) Wire::fence_for_network();
    if (!h.is_here(rank) && header_on(h, rank, turn) == nullptr) {
      Wire::put(&mail_to(h).received[turn], &mail_from(h, rank).sent[turn],
                words * sizeof(uint32_t), h.pe[rank]);
      __syncwarp();
    }
    if (lane_id() != 0) continue;
    // Partner: the loads in receive_headers().
    if (h.is_here(rank)) {
      fence_system();
      store_word(&mail_on(h, rank).header_signals[turn], stamp);
    } else {
      Wire::fence();
      Wire::signal(Signal::kHeader, &mail_to(h).header_signals[turn], stamp, h.pe[rank]);
    }
  }
}

// Waits for the header of a rank, and compares its signature.
__device__ inline void receive_header(const Hosts& h, const HostsState& hs, CtaState& s, int rank) {
  const uint32_t turn = hs.epoch[rank] % 2;
  const MailOfPe& mail = mail_from(h, rank);
  const uint64_t* signal = &mail.header_signals[turn];
  const uint64_t stamp = stamp_of(hs.epoch[rank], 0);
  const bool here = h.is_here(rank);
  // Partner: send_headers() on the peer.
  const bool arrived = here ? wait_until(h.local, s, kWaitCounts, h.local_of[rank],
                                         [&] { return load_acquire_word(signal) == stamp; })
                            : wait_for_host(h, s, kWaitSignature, rank, [&] {
                                return Wire::has(Signal::kHeader, signal, stamp);
                              });
  if (!arrived || here) return;
  uint32_t found[kSignatureWords];  // all on their way before one is looked at
#pragma unroll
  for (int word = 0; word < kSignatureWords; ++word) {
    found[word] = mail.received[turn].signature[word];
  }
  int first = kSignatureWords;  // word that differs
  uint32_t its_value = 0;
#pragma unroll
  for (int word = kSignatureWords - 1; word >= 0; --word) {
    if (found[word] == h.local.signature[word]) continue;
    first = word;
    its_value = found[word];
  }
  if (first == kSignatureWords) return;
  fail_between_hosts(h, s, kSignatureDiffers, rank, first, h.local.signature[first], its_value);
}

// Waits for the headers of all ranks. After it every thread may read them. All threads. False, for
// all threads: an exchange has failed.
__device__ inline bool receive_headers(const Hosts& h, const HostsState& hs, CtaState& s) {
  const auto rank = static_cast<int>(threadIdx.x);
  if (rank < h.num_ranks) receive_header(h, hs, s, rank);
  return !__syncthreads_or(has_failed(s));
}

}  // namespace freeio::cuda
