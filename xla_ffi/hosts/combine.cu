// combine between hosts.
//
// A token's rank puts the routes of its tokens to its rail on each other host. The rail sums the
// token's rows of its host, which it reads out of the tensors of its host's ranks, and one sum goes
// back. So one row crosses for each pair of a token and a host. The token's rank sums the rows of
// its own host in the same way, and adds the sums of the hosts.
//
// The answers of a round are the credit for it: a rank puts the routes of round n+2 when it has
// added up all its tokens of round n. By then the rail needs these routes no more, and the network
// has read the rail's sums.
#include "cuda/device/elements.cuh"
#include "cuda/device/end.cuh"
#include "cuda/device/opening.cuh"
#include "hosts/device/parcels.cuh"
#include "hosts/kernels.h"

namespace freeio::cuda {
namespace {

constexpr int kRoutesWarp = kWarps - 1;    // puts the routes of the rounds after the second one
constexpr int kSummingWarps = kWarps - 1;  // the others

// The routes of a token in the lanes: lane k has assignment k.
template <typename Accumulator>
struct Lanes {
  int rank = -1;
  int row = -1;
  Accumulator weight = 1;
};

// How one warp sums the rows of tokens.
template <typename Element, int kCount>
struct SummingWarp {
  using Accumulator = typename Element::Accumulator;
  using R = Raw<Element, kCount>;
  static constexpr int kStep = kWarpSize * kCount;
  static constexpr int kRows = 4;     // loaded together
  static constexpr int kColumns = 2;  // steps of a row that are loaded together

  // This lane's elements of some steps of a row.
  struct Columns {
    int first;
    int end;  // of all lanes

    __device__ int at(int step) const { return first + step * kStep; }
    __device__ bool has(int step) const { return at(step) < end; }
  };

  const HostsCombineParams& p;
  const Hosts& h;
  const HostsState& hs;
  CtaState& s;

  // The routes that lie at these places, from `a` on.
  __device__ static Lanes<Accumulator> routes_at(const Hosts& h, const int32_t* dest_rank,
                                                 const int32_t* dest_row, const void* weights,
                                                 int64_t a) {
    Lanes<Accumulator> lanes;
    if (lane_id() < h.top_k) {
      lanes.rank = dest_rank[a + lane_id()];
      lanes.row = dest_row[a + lane_id()];
      if (weights != nullptr) {
        lanes.weight = static_cast<const Accumulator*>(weights)[a + lane_id()];
      }
    }
    return lanes;
  }
  __device__ Lanes<Accumulator> own_routes(int token) const {
    return routes_at(h, h.dest_rank, h.dest_row, h.weights, int64_t{token} * h.top_k);
  }
  __device__ Lanes<Accumulator> routes_of(const std::byte* window, int slot) const {
    const Rounds& r = h.rounds;
    return routes_at(h, reinterpret_cast<const int32_t*>(window + r.dest_rank_at),
                     reinterpret_cast<const int32_t*>(window + r.dest_row_at),
                     r.weight_bytes > 0 ? window + r.weights_at : nullptr, int64_t{slot} * h.top_k);
  }

  // Lanes whose row is on a host.
  __device__ uint32_t on_host(const Lanes<Accumulator>& lanes, int host) const {
    const bool is_there = lanes.rank >= 0 && h.host_of[lanes.rank] == host;
    return __ballot_sync(kFullWarp, is_there);
  }

  // The sums of the token's rows on this host, rounded where they are rounded before they cross:
  // each rank's rows in order of k, then the ranks in order. Whole warp; this lane's elements of
  // kColumns steps from `first` on, if it has any. Several rows are loaded before they are added.
  __device__ void sum_of_host(const Lanes<Accumulator>& lanes, const Columns& columns,
                              R (&sums)[kColumns]) const {
    Accumulator totals[kColumns][kCount] = {};
    for (int local = 0; local < h.num_local(); ++local) {
      const int rank = h.rank_at[h.host * h.num_local() + local];
      uint32_t mask = __ballot_sync(kFullWarp, lanes.rank == rank);
      if (mask == 0) continue;
      const auto* expert_rows = rank == h.rank ? static_cast<const Element*>(p.expert_out)
                                               : s.buffer<const Element>(local, kFirstLeaf);
      Accumulator partial[kColumns][kCount] = {};
      while (mask != 0) {
        R raw[kRows][kColumns];
        Accumulator weights[kRows];
        const int count = __popc(mask);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= count) break;
          const int k = __ffs(static_cast<int>(mask)) - 1;
          mask &= mask - 1;
          const int64_t row = __shfl_sync(kFullWarp, lanes.row, k);
          weights[i] = __shfl_sync(kFullWarp, lanes.weight, k);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (!columns.has(c)) continue;
            raw[i][c] = load_raw<Element, kCount>(expert_rows + row * p.width + columns.at(c));
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= count) break;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (columns.has(c)) add_weighted<Element, kCount>(weights[i], raw[i][c], partial[c]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        add<Element, kCount>(round_to<Element, kCount>(partial[c]), totals[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c] = round_to<Element, kCount>(totals[c]);
  }

  // The columns of a part of the answers.
  __device__ int part_begin(int part) const { return part * h.rounds.part_columns; }
  __device__ int part_end(int part) const {
    return min(part_begin(part) + h.rounds.part_columns, p.width);
  }
  // The signal of a part among those of the round.
  __device__ int signal_of(const Parcel& parcel, int part) const {
    return parcel.number * h.rounds.answer_parts + part;
  }

  // For the parcel of a rank of another host, whose rail this GPU is.
  __device__ void answer(int host, const Parcel& parcel, int part) const {
    bool arrived = true;
    if (lane_id() == 0) arrived = await_parcel(h, hs, s, host, parcel.round, parcel.number);
    if (__shfl_sync(kFullWarp, arrived, 0) == 0) return;
    const int source = h.rail_on(host);
    const int half = parcel.half();
    const std::byte* const requests = window_for(h, host, half, kRequests);
    std::byte* const answers = window_to(h, half, kAnswers);
    // The network takes the sums from here.
    std::byte* const direct = Wire::direct(answers, h.pe[source]);
    std::byte* const sums = direct != nullptr ? direct : window_for(h, host, half, kOutbox);
    const int64_t row_bytes = h.rounds.answer_bytes;
    const int64_t part_at = part_begin(part) * static_cast<int64_t>(sizeof(Element));
    const auto part_bytes =
        static_cast<size_t>(part_end(part) - part_begin(part)) * sizeof(Element);
    for (int slot = parcel.first_slot; slot < parcel.first_slot + parcel.size(); ++slot) {
      const Lanes<Accumulator> lanes = routes_of(requests, slot);
      if (on_host(lanes, h.host) == 0) continue;
      std::byte* const sum = sums + slot * row_bytes;
      for (int begin = part_begin(part); begin < part_end(part); begin += kColumns * kStep) {
        const Columns columns{begin + lane_id() * kCount, part_end(part)};
        R of_host[kColumns];
        sum_of_host(lanes, columns, of_host);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (!columns.has(c)) continue;
          store_raw<Element, kCount>(reinterpret_cast<Element*>(sum) + columns.at(c), of_host[c]);
        }
      }
      if (direct != nullptr) continue;
      fence_system();  // the network reads what all lanes have stored
      __syncwarp();
      Wire::put(answers + slot * row_bytes + part_at, sum + part_at, part_bytes, h.pe[source]);
    }
    __syncwarp();
    if (lane_id() != 0) return;
    Wire::fence();
    // Partner: await_answers() on the source.
    Wire::signal(Signal::kAnswer, &mail_to_host(h).answers[half][signal_of(parcel, part)],
                 stamp_of(hs.epoch[source], parcel.round), h.pe[source]);
  }

  // Waits for the answers of all hosts to this rank's parcel. A host without rows of the parcel
  // answers, too: its answer says that it needs the routes no more. Whole warp.
  __device__ bool await_answers(const Parcel& parcel, int part) const {
    bool arrived = true;
    for (int n = lane_id(); n < h.num_others(); n += kWarpSize) {
      const int host = h.other_host(n);
      const int rail = h.rail_on(host);
      const uint64_t stamp = stamp_of(hs.epoch[rail], parcel.round);
      const uint64_t* signal =
          &mail_from_host(h, host).answers[parcel.half()][signal_of(parcel, part)];
      // Partner: answer() on the rail.
      arrived = arrived && wait_for_host(h, s, kWaitPartialSums, rail,
                                         [&] { return Wire::has(Signal::kAnswer, signal, stamp); });
    }
    return __all_sync(kFullWarp, arrived);
  }

  // Adds up the sums of the hosts for one of this rank's tokens, in order of the hosts. Waits for
  // those of the others, unless `has_answers`, once it has a sum of this host. False: the exchange
  // has failed.
  __device__ bool sum_token(const Parcel& parcel, int part, int token, bool& has_answers) const {
    const Lanes<Accumulator> lanes = own_routes(token);
    for (int begin = part_begin(part); begin < part_end(part); begin += kColumns * kStep) {
      const Columns columns{begin + lane_id() * kCount, part_end(part)};
      R of_this_host[kColumns] = {};
      if (on_host(lanes, h.host) != 0) sum_of_host(lanes, columns, of_this_host);
      has_answers = has_answers || await_answers(parcel, part);
      if (!has_answers) return false;
      Accumulator totals[kColumns][kCount] = {};
      for (int host = 0; host < h.num_hosts; ++host) {
        if (on_host(lanes, host) == 0) continue;
        const auto* sum = reinterpret_cast<const Element*>(
            window_for(h, host, parcel.half(), kAnswers) +
            int64_t{parcel.slot_of(token)} * h.rounds.answer_bytes);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          R of_host = of_this_host[c];
          if (host != h.host && columns.has(c)) {
            of_host = load_raw<Element, kCount>(sum + columns.at(c));
          }
          add<Element, kCount>(of_host, totals[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (!columns.has(c)) continue;
        store_raw<Element, kCount>(
            static_cast<Element*>(p.sums) + int64_t{token} * p.width + columns.at(c),
            round_to<Element, kCount>(totals[c]));
      }
    }
    return true;
  }

  // For this rank's own parcel.
  __device__ void sum(const Parcel& parcel, int part) const {
    bool has_answers = false;
    for (int token = parcel.first_token; token < parcel.end_token; ++token) {
      if (!sum_token(parcel, part, token, has_answers)) return;
    }
    // Rows may have no columns.
    if (!has_answers && !await_answers(parcel, part)) return;
    __syncwarp();
    // Partner: await_summed(). The counter also says that the answers have been read.
    if (lane_id() == 0) {
      add_acquire_release_device(&h.layout.mail_of_self(own_landing(h)).num_summed[parcel.half()],
                                 1);
    }
  }

  // The summing warps take the parcels in order: of each, first those of the other hosts, and then
  // this rank's own, all in parts. A parcel has the same CTA on all ranks. So the answers for which
  // a warp waits come from items before its own.
  __device__ void run() const {
    const ParcelsOfCta parcels{h};
    const int parts = h.rounds.answer_parts;
    const int per_parcel = h.num_hosts * parts;
    const int items = parcels.size() * per_parcel;
    // Beyond the last one when the exchange has failed.
    for (int item = warp_id(); item < items; item = next_item(s)) {
      const int number = item / per_parcel;
      const Parcel parcel = parcels[number];
      if (parcel.size() == 0) continue;
      const int in_parcel = item - number * per_parcel;
      const int turn = in_parcel / parts;
      const int part = in_parcel - turn * parts;
      if (turn < h.num_others()) {
        answer(h.other_host(turn), parcel, part);
      } else {
        sum(parcel, part);
      }
    }
  }

  // Waits until this rank has added up all tokens of a round. Whole warp.
  __device__ bool await_summed(int round) const {
    bool all = true;
    if (lane_id() == 0) {
      const uint32_t parts = parcels_up_to(h, round) * h.rounds.answer_parts;
      const uint32_t* summed = &h.layout.mail_of_self(own_landing(h)).num_summed[round % kHalves];
      // Partner: sum().
      all = wait_for_own_warps(h, s, [&] { return load_acquire_system(summed) >= parts; });
    }
    return __shfl_sync(kFullWarp, all, 0) != 0;
  }

  // What one warp does instead.
  __device__ void push_routes() const {
    const Team team = Team::all();
    int summed = -1;
    for_each_push(h, kHalves, h.rounds.count, team.number, team.size,
                  [&](const Parcel& parcel, int host) {
                    if (has_failed(s)) return;
                    const int needed = parcel.round - kHalves;
                    if (summed < needed && !await_summed(needed)) return;
                    summed = needed;
                    put_routes(h, hs, parcel, host);
                  });
  }
};

template <typename Element, int kCount>
__device__ void combine(const HostsCombineParams& p, CtaState& s, HostsState& hs) {
  const Hosts& h = p.hosts;
  const Opening opening(h.local);
  load_epochs(h, hs);
  if (!open(h.local, s, opening)) return;
  if (threadIdx.x == 0) s.next_item = kSummingWarps;
  enter(s, kRouting);
  constexpr uint32_t kAddresses = 1u << kFirstLeaf;
  if (blockIdx.x == 0) {
    post(h.local, s, kAddresses);
    send_headers(h, hs, nullptr, 0);
  }
  push_ahead(h, [&](const Parcel& parcel, int host) { put_routes(h, hs, parcel, host); });
  enter(s, kAgreeing);
  if (!receive_headers(h, hs, s) || !receive_addresses(h.local, s, kAddresses)) return;
  enter(s, kMoving);
  const SummingWarp<Element, kCount> warp{p, h, hs, s};
  if (warp_id() == kRoutesWarp) {
    warp.push_routes();
  } else {
    warp.run();
  }
  finish_between_hosts<false>(h, hs, s);
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    hosts_combine_kernel(const __grid_constant__ HostsCombineParams p) {
  __shared__ CtaState s;
  __shared__ HostsState hs;
  combine<Element, kCount>(p, s, hs);
  leave_between_hosts(p.hosts, s, [&](const Team& spoilers) {
    const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(Element));
    spoil(spoilers, p.sums, p.hosts.num_tokens * row_bytes);
  });
}

}  // namespace

Kernel hosts_combine(DType dtype, bool wide) {
  Kernel kernel;
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    constexpr int kWide = wide_pack(sizeof(Element));
    kernel.function = wide ? reinterpret_cast<const void*>(&hosts_combine_kernel<Element, kWide>)
                           : reinterpret_cast<const void*>(&hosts_combine_kernel<Element, 1>);
  });
  return kernel;
}

}  // namespace freeio::cuda
