// Parcels: how rows and routes of tokens go to other hosts.
//
// The token's rank puts a row once into the window on its rail of each other host, however many
// experts there want it. It puts the routes of the parcel, a fence, and a signal. The ranks of that
// host pull the rows out of the window over NVLink. Only the GPU of the window sees what the
// network wrote when it sees the signal. So it passes the signal on, by a release of system scope.
//
// A window has two halves, and the rounds of a call use them in turn. A rank puts round n+2 when it
// has the credit for round n: nobody there needs that round any more. A call ends when its ranks
// have all credits. So every call finds both halves free, and small calls, which have one round,
// wait for no credit before they put. Until it has the credit, the network may read what this rank
// put.
//
// Warps wait in an order that has no circle: whatever belongs to a round waits only for things of
// that round that come earlier on their way, or for earlier rounds.
#pragma once

#include "cuda/device/rows.cuh"
#include "hosts/device/headers.cuh"

namespace freeio::cuda {

// How the warps of each CTA share the work once the exchange is open.
constexpr int kRelayWarp = kWarps - 1;  // passes signals on, and gives credits
// These put parcels, in a small call from the third round on. For each parcel a warp waits for its
// loads and for a fence, so that one alone would leave the link idle.
constexpr int kPushWarps = 3;
constexpr int kMovingWarps = kWarps - 1 - kPushWarps;  // the first ones move rows

// The warps of all CTAs that share the pushes. For a push warp.
__device__ inline Team push_team() {
  const Team ctas = Team::all();
  return {(warp_id() - kMovingWarps) * ctas.size + ctas.number, kPushWarps * ctas.size};
}

// A part of a round's tokens of one rank.
struct Parcel {
  int round;
  int number;  // in the round
  int first_token;
  int end_token;
  int first_slot;  // of the first token, in the round

  __device__ Parcel(const Hosts& h, int its_round, int its_number)
      : round(its_round), number(its_number) {
    const Rounds& r = h.rounds;
    const int round_begin = round * r.tokens;
    const int round_end = min(round_begin + r.tokens, h.num_tokens);
    first_slot = number * r.parcel_tokens;
    first_token = min(round_begin + first_slot, round_end);
    end_token = min(first_token + r.parcel_tokens, round_end);
  }
  __device__ int half() const { return round % kHalves; }
  __device__ int size() const { return end_token - first_token; }
  __device__ int slot_of(int token) const { return token - first_token + first_slot; }
};

// This CTA's share of the parcels of all rounds, in order. Neighbours are of different CTAs.
struct ParcelsOfCta {
  const Hosts& h;
  Team team = Team::all();

  __device__ int size() const {
    return (h.rounds.parcels * h.rounds.count - team.number + team.size - 1) / team.size;
  }
  __device__ Parcel operator[](int n) const {
    const int parcel = n * team.size + team.number;
    const int round = parcel / h.rounds.parcels;
    return Parcel(h, round, parcel - round * h.rounds.parcels);
  }
};

// A warp's item of pulling: columns of the rows that a rank's parcel has for this rank.
struct Pull {
  int parcel;  // of this CTA's
  int rank;
  int part;

  __device__ static int per_parcel(const Hosts& h) { return h.num_ranks * h.rounds.pull_parts; }
  // This host's ranks come first, because rows of the others take longer to come.
  __device__ Pull(const Hosts& h, int item) {
    parcel = item / per_parcel(h);
    const int in_parcel = item - parcel * per_parcel(h);
    const int turn = in_parcel / h.rounds.pull_parts;
    part = in_parcel - turn * h.rounds.pull_parts;
    const int host = (h.host + turn / h.num_local()) % h.num_hosts;
    const int local = (h.local.rank + 1 + turn % h.num_local()) % h.num_local();
    rank = h.rank_at[host * h.num_local() + local];
  }
  // This part of `size` things.
  __device__ int begin(const Hosts& h, int size) const { return size * part / h.rounds.pull_parts; }
  __device__ int end(const Hosts& h, int size) const {
    return size * (part + 1) / h.rounds.pull_parts;
  }
};

// Parcels of a round that have tokens.
__device__ inline int parcels_in(const Hosts& h, int round) {
  const int tokens = min(h.rounds.tokens, h.num_tokens - round * h.rounds.tokens);
  return (tokens + h.rounds.parcel_tokens - 1) / h.rounds.parcel_tokens;
}

// Parcels of a round and of the earlier rounds that use the same half.
__device__ inline uint32_t parcels_up_to(const Hosts& h, int round) {
  int parcels = 0;
  for (int r = round; r >= 0; r -= kHalves) parcels += parcels_in(h, r);
  return static_cast<uint32_t>(parcels);
}

// The window on the rail of this host that belongs to a rank of another host.
__device__ inline std::byte* window_of(const Hosts& h, int rank, int half, Part part) {
  return h.layout.window(h.landing[h.local_of[rank]], h.host_number[h.host_of[rank]], half, part);
}
// The window here that belongs to this GPU's pair on another host.
__device__ inline std::byte* window_for(const Hosts& h, int host, int half, Part part) {
  return h.layout.window(own_landing(h), h.host_number[host], half, part);
}
// The window of this GPU on its pair on another host; the address is this GPU's own.
__device__ inline std::byte* window_to(const Hosts& h, int half, Part part) {
  return window_for(h, h.host, half, part);
}

// Calls f(parcel, host) for this warp's share of the parcels of rounds [begin, end) to other hosts.
// The share is the same whenever it is asked for. Whole warp.
template <typename F>
__device__ void for_each_push(const Hosts& h, int begin, int end, int team, int team_size,
                              const F& f) {
  const int per_round = h.rounds.parcels * h.num_others();
  for (int round = begin; round < end; ++round) {
    for (int i = team; i < per_round; i += team_size) {
      const Parcel parcel(h, round, i / h.num_others());
      if (parcel.size() > 0) f(parcel, h.other_host(i % h.num_others()));
    }
  }
}

// A warp's columns of rows that several warps share: the n-th of `count` parts.
struct ShareOfRow {
  int n = 0;
  int count = 1;

  // Where it begins in a row, in bytes. All but the last one are whole accesses.
  __device__ int64_t begin(int64_t row_bytes) const {
    constexpr int64_t kAccess = 16;
    return n == count ? row_bytes : row_bytes / kAccess * n / count * kAccess;
  }
  __device__ int64_t end(int64_t row_bytes) const {
    return ShareOfRow{n + 1, count}.begin(row_bytes);
  }
};

// Puts the rows of those of the parcel's tokens that go to the host: those with an assignment `a`
// for which goes_to(a) is the host. Whole warp.
//
// Several warps may share the rows if a link reaches the host. What goes by the network must be put
// by the warp that signals. There the warp of the first share puts all.
template <typename GoesTo>
__device__ void put_rows(const Hosts& h, const Parcel& parcel, int host, const GoesTo& goes_to,
                         const ShareOfRow& share = {}) {
  std::byte* const window = window_to(h, parcel.half(), kRequests);
  const int pe = h.pe[h.rail_on(host)];
  std::byte* const linked = share.count > 1 ? Wire::direct(window, pe) : nullptr;
  if (linked == nullptr && share.n > 0) return;
  for (int token = parcel.first_token; token < parcel.end_token; ++token) {
    const bool goes = lane_id() < h.top_k && goes_to(token * h.top_k + lane_id()) == host;
    if (__ballot_sync(kFullWarp, goes) == 0) continue;
    for (int i = 0; i < h.num_leaves; ++i) {
      const SentLeaf& leaf = h.leaves[i];
      const int64_t to = leaf.at + parcel.slot_of(token) * leaf.row_bytes;
      const std::byte* const row = leaf.tokens + token * leaf.row_bytes;
      if (linked == nullptr) {
        Wire::put(window + to, row, leaf.row_bytes, pe);
      } else {
        const int64_t begin = share.begin(leaf.row_bytes);
        Wire::store(linked + to + begin, row + begin, share.end(leaf.row_bytes) - begin);
      }
    }
  }
}

// Puts the routes of the parcel, and signals that it is there. The warp that has put its rows, or a
// barrier after others have stored them. Whole warp.
__device__ inline void put_routes(const Hosts& h, const HostsState& hs, const Parcel& parcel,
                                  int host) {
  const Rounds& r = h.rounds;
  std::byte* const window = window_to(h, parcel.half(), kRequests);
  const int rail = h.rail_on(host);
  const int64_t first = int64_t{parcel.first_slot} * h.top_k;
  const int64_t a = int64_t{parcel.first_token} * h.top_k;
  const int64_t count = int64_t{parcel.size()} * h.top_k;
  const auto words = [&](int64_t at, const void* from, int64_t bytes) {
    return Words{window + at + first * bytes, static_cast<const std::byte*>(from) + a * bytes,
                 count * bytes};
  };
  // The network reads the handle, which other CTAs have written, too.
  Wire::fence_for_network();
  __syncwarp();
  Wire::put_all({words(r.dest_rank_at, h.dest_rank, sizeof(int32_t)),
                 words(r.dest_row_at, h.dest_row, sizeof(int32_t)),
                 words(r.weights_at, h.weights, r.weight_bytes)},
                h.pe[rail]);
  if (lane_id() != 0) return;
  Wire::fence();
  // Partner: has_parcel() on the rail.
  Wire::signal(Signal::kParcel, &mail_to_host(h).parcels[parcel.half()][parcel.number],
               stamp_of(hs.epoch[rail], parcel.round), h.pe[rail]);
}

// Waits until the parcel of this GPU's pair on another host is in the window here. One thread.
__device__ inline bool await_parcel(const Hosts& h, const HostsState& hs, CtaState& s, int host,
                                    int round, int number) {
  const int source = h.rail_on(host);
  const uint64_t stamp = stamp_of(hs.epoch[source], round);
  const uint64_t* signal = &mail_from_host(h, host).parcels[round % kHalves][number];
  // Partner: put_routes() on the source.
  return wait_for_host(h, s, kWaitRows, source,
                       [&] { return Wire::has(Signal::kParcel, signal, stamp); });
}

// Waits until the parcel of a rank of another host is in its window here. If that is on another
// GPU, its rank says so. The whole warp.
__device__ inline bool await_window(const Hosts& h, const HostsState& hs, CtaState& s, int source,
                                    const Parcel& parcel) {
  bool arrived = true;
  if (lane_id() == 0 && h.local_of[source] == h.local.rank) {
    arrived = await_parcel(h, hs, s, h.host_of[source], parcel.round, parcel.number);
  } else if (lane_id() == 0) {
    // Of this rank's exchange with the rail: the rail's with the source may have another number.
    const int rail = h.rank_at[h.host * h.num_local() + h.local_of[source]];
    const uint64_t stamp = stamp_of(hs.epoch[rail], parcel.round);
    const uint64_t* word = &mail_from(h, source).relayed[parcel.half()][parcel.number];
    // Partner: relay(). The rail may be alive and wait for its source, so that is who is late.
    arrived =
        wait_for_host(h, s, kWaitRows, source, [&] { return load_acquire_word(word) == stamp; });
  }
  return __shfl_sync(kFullWarp, arrived, 0) != 0;
}

// Passes the signal of a parcel on to the other ranks of this host, when it has come. Whole warp.
__device__ inline void relay(const Hosts& h, const HostsState& hs, CtaState& s, int host, int round,
                             int number) {
  bool arrived = true;
  if (lane_id() == 0) arrived = await_parcel(h, hs, s, host, round, number);
  if (__shfl_sync(kFullWarp, arrived, 0) == 0) return;
  const int source = h.rail_on(host);
  // The first lane has seen what the network wrote. The fences of the lanes publish it.
  fence_system();
  for (int local = lane_id(); local < h.num_local(); local += kWarpSize) {
    if (local == h.local.rank) continue;
    MailOfPe& mail = h.layout.mail_of_pe(h.landing[local], h.pe[source]);
    const int rank = h.rank_at[h.host * h.num_local() + local];
    // Partner: await_window(), on the other ranks of this host.
    store_word(&mail.relayed[round % kHalves][number], stamp_of(hs.epoch[rank], round));
  }
}

// Says that this rank needs a part of the parcel of a rank of another host no more. `kPublishes`:
// and that what this warp has stored on the rail is there. Whole warp.
template <bool kPublishes>
__device__ void drain(const Hosts& h, int source, int half) {
  __syncwarp();
  if (lane_id() != 0) return;
  uint32_t* const drained =
      &h.layout.mail_of_host(h.landing[h.local_of[source]], h.host_number[h.host_of[source]])
           .num_drained[half];
  // Partner: the load in give_credit() on the rail.
  if constexpr (kPublishes) {
    add_release_system(drained, 1);
  } else {
    add_relaxed_system(drained, 1);
  }
}

// Waits until no rank of this host needs the round of this GPU's pair on another host, puts the
// answers that the ranks of this host have left here, and says so. Whole warp.
__device__ inline void give_credit(const Hosts& h, const HostsState& hs, CtaState& s, int host,
                                   int round) {
  const int source = h.rail_on(host);
  const int half = round % kHalves;
  bool all = true;
  if (lane_id() == 0) {
    const uint32_t* drained = &mail_from_host(h, host).num_drained[half];
    const uint32_t parts = parcels_up_to(h, round) * h.num_local() * h.rounds.pull_parts;
    // Partner: drain(). A rank of this host is late mostly because the source is.
    all = wait_for_host(h, s, kWaitFinish, source,
                        [&] { return load_acquire_system(drained) >= parts; });
  }
  if (__shfl_sync(kFullWarp, all, 0) == 0) return;
  if (const int64_t bytes = h.rounds.answer_bytes; bytes > 0) {
    fence_system();
    __syncwarp();
    const int tokens = min(h.rounds.tokens, h.num_tokens - round * h.rounds.tokens);
    Wire::put(window_to(h, half, kAnswers), window_for(h, host, half, kOutbox), tokens * bytes,
              h.pe[source]);
    __syncwarp();
  }
  if (lane_id() != 0) return;
  Wire::fence();
  // Partner: await_credit() on the source.
  Wire::signal(Signal::kCredit, &mail_to_host(h).credits[half], stamp_of(hs.epoch[source], round),
               h.pe[source]);
}

// What the relay warp of each CTA does. Whole warp.
__device__ inline void run_relay(const Hosts& h, const HostsState& hs, CtaState& s) {
  const Team team = Team::all();
  // Credits come one round late. Parcels of the next round do not wait for them.
  for (int round = 0; round <= h.rounds.count; ++round) {
    const bool relays = h.num_local() > 1 && round < h.rounds.count;
    const int items = relays ? parcels_in(h, round) * h.num_others() : 0;
    for (int i = team.number; i < items && !has_failed(s); i += team.size) {
      relay(h, hs, s, h.other_host(i % h.num_others()), round, i / h.num_others());
    }
    if (round == 0) continue;
    for (int i = team.number; i < h.num_others() && !has_failed(s); i += team.size) {
      give_credit(h, hs, s, h.other_host(i), round - 1);
    }
  }
}

// Waits for the credit of a round of this rank. Then the answers are here, too. Whole warp.
__device__ inline bool await_credit(const Hosts& h, const HostsState& hs, CtaState& s, int host,
                                    int round) {
  bool arrived = true;
  if (lane_id() == 0) {
    const int rail = h.rail_on(host);
    const uint64_t stamp = stamp_of(hs.epoch[rail], round);
    const uint64_t* signal = &mail_from_host(h, host).credits[round % kHalves];
    // Partner: give_credit() on the rail.
    arrived = wait_for_host(h, s, kWaitFinish, rail,
                            [&] { return Wire::has(Signal::kCredit, signal, stamp); });
  }
  return __shfl_sync(kFullWarp, arrived, 0) != 0;
}

// The first two rounds find their halves free. So in a small call all warps put them at once. Calls
// put(parcel, host). Whole warp.
template <typename Put>
__device__ void push_ahead(const Hosts& h, const Put& put) {
  if (!h.rounds.pushes_ahead) return;
  const Team team = Team::all();
  for_each_push(h, 0, min(kHalves, h.rounds.count), warp_id() * team.size + team.number,
                kWarps * team.size, put);
}

// The same for a dispatch, whose CTAs find the rows of a chunk of tokens each. If parcels are
// tokens, a CTA puts its own, and need not know what the other CTAs have found.
template <typename Put>
__device__ void push_ahead(const Hosts& h, const Chunk& chunk, const Put& put) {
  if (!h.rounds.pushes_ahead || !h.rounds.are_parcels_tokens()) return push_ahead(h, put);
  for (int i = warp_id(); i < chunk.size() * h.num_others(); i += kWarps) {
    put(Parcel(h, 0, chunk.begin + i / h.num_others()), h.other_host(i % h.num_others()));
  }
}

// The same for rows alone: put(parcel, host, share). In a CTA with few parcels several warps share
// each. The warp of the first share is the one that push_ahead() gives the parcel. It may signal
// the parcel after a barrier.
template <typename Put>
__device__ void push_rows_ahead(const Hosts& h, const Chunk& chunk, const Put& put) {
  const auto whole = [&](const Parcel& parcel, int host) { put(parcel, host, ShareOfRow()); };
  const int count = chunk.size() * h.num_others();
  if (!h.rounds.are_parcels_tokens() || count > kWarps / 2) return push_ahead(h, chunk, whole);
  if (!h.rounds.pushes_ahead || count == 0) return;
  const ShareOfRow share{warp_id() / count, kWarps / count};
  if (share.n == share.count) return;  // one of the last warps, if the shares are not even
  const int i = warp_id() % count;
  put(Parcel(h, 0, chunk.begin + i / h.num_others()), h.other_host(i % h.num_others()), share);
}

// What a push warp does: it puts the first two rounds by put(parcel, host), unless
// push_ahead() has. It waits for each round's credit, takes the answers by
// take(parcel, host), and puts the round after the next one by put(parcel, host). Whole warp.
template <typename Take, typename Put>
__device__ void run_push(const Hosts& h, const HostsState& hs, CtaState& s, const Take& take,
                         const Put& put) {
  const Team team = push_team();
  if (!h.rounds.pushes_ahead) {
    for_each_push(h, 0, min(kHalves, h.rounds.count), team.number, team.size, put);
  }
  for_each_push(h, 0, h.rounds.count, team.number, team.size, [&](const Parcel& before, int host) {
    if (has_failed(s) || !await_credit(h, hs, s, host, before.round)) return;
    take(before, host);
    if (before.round + kHalves >= h.rounds.count) return;
    const Parcel parcel(h, before.round + kHalves, before.number);
    if (parcel.size() > 0) put(parcel, host);
  });
}

// Ends the exchange. All threads.
template <bool kPublishes>
__device__ void finish_between_hosts(const Hosts& h, const HostsState& hs, CtaState& s) {
  finish<kPublishes>(h.local, s);
  // The first warp has waited for all CTAs of this host. So nobody uses what follows any more.
  __syncthreads();
  if (blockIdx.x != 0 || has_failed(s)) return;
  for (int rank = static_cast<int>(threadIdx.x); rank < h.num_ranks; rank += kThreads) {
    mail_from(h, rank).epoch = hs.epoch[rank];
    for (int half = 0; half < kHalves; ++half) {
      mail_from_host(h, h.host_of[rank]).num_drained[half] = 0;
    }
  }
  if (threadIdx.x < kHalves) h.layout.mail_of_self(own_landing(h)).num_summed[threadIdx.x] = 0;
}

// Last phase of every kernel; as leave(). All threads.
template <typename Spoil>
__device__ void leave_between_hosts(const Hosts& h, CtaState& s, const Spoil& spoil_results) {
  __syncthreads();
  if (has_failed(s) && warp_id() == 0) tell_hosts(h);
  leave(h.local, s, spoil_results);
}

}  // namespace freeio::cuda
