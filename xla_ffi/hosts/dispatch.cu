// dispatch between hosts, and dispatch along a handle.
//
// As dispatch within a host: the expert's rank pulls each row to all of its places here. From a
// rank of its host it pulls out of the source's tensor, from a rank of another host out of the
// window on that rank's rail here. Rows leave for other hosts before anything is known of the other
// ranks' routing.
#include "cuda/device/opening.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/dispatch/assignment_rows.cuh"
#include "cuda/dispatch/slices.cuh"
#include "hosts/device/parcels.cuh"
#include "hosts/kernels.h"

namespace freeio::cuda {
namespace {

constexpr uint32_t kRoutesOfPeers = 1u << kDestRank | 1u << kDestRow;

// --- Routing -------------------------------------------------------------------------------------

// Counts in `next` the assignments that come before this CTA's. The first CTA counts all, and sends
// the counts to all ranks. All threads; a barrier must follow.
__device__ void count_and_send_headers(const DispatchParams& p, const Hosts& h,
                                       const HostsState& hs, const Routing& routing,
                                       const Chunk& chunk) {
  const Exchange& x = p.exchange;
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.next[e] = 0;
  }
  __shared__ int num_invalid;
  if (threadIdx.x == 0) num_invalid = 0;
  __syncthreads();
  const bool counts_all = blockIdx.x == 0;
  const int end = (counts_all ? x.num_tokens : chunk.begin) * x.top_k;
  int invalid = 0;
  constexpr int kInFlight = 8;
  for (int begin = static_cast<int>(threadIdx.x); begin < end; begin += kInFlight * kThreads) {
    int ids[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int a = begin + u * kThreads;
      ids[u] = a < end ? p.topk_idx[a] : -1;
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (ids[u] >= 0 && ids[u] < x.num_experts) {
        atomicAdd(&routing.next[ids[u]], 1u);
      } else {
        invalid += ids[u] != -1;
      }
    }
  }
  if (!counts_all) return;
  if (invalid != 0) atomicAdd(&num_invalid, invalid);
  __syncthreads();
  if (threadIdx.x == 0) *p.num_invalid = num_invalid;
  send_headers(h, hs, routing.next, x.num_experts);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.next[e] = 0;  // nothing comes before its assignments
  }
}

// Adds up the counts of all ranks. All threads; a barrier must follow.
__device__ void add_counts(const DispatchParams& p, const Hosts& h, const HostsState& hs,
                           const Routing& routing) {
  const Exchange& x = p.exchange;
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    uint32_t load = 0;
    for (int rank = 0; rank < x.num_ranks; ++rank) {
      if (rank == x.rank) routing.first[e] = load;
      load += mail_from(h, rank).received[hs.epoch[rank] % 2].counts[e];
    }
    routing.load[e] = load;
  }
}

// Finds the rows of the chunk's assignments, and writes them to the handle. When all CTAs have done
// so, the ranks of this host learn where the handle is. All threads.
__device__ void assign_rows(const DispatchParams& p, const Hosts& h, const CtaState& s,
                            const Routing& routing, const Chunk& chunk) {
  const Exchange& x = p.exchange;
  number_assignments(p, routing, chunk, first_id(p, chunk), [&](int a, int id, uint32_t number) {
    const int row = id < 0 ? -1 : row_or_none(x, routing.first[id], number);
    p.dest_rank[a] = row < 0 ? -1 : x.local_experts.quotient(id);
    p.dest_row[a] = row;
  });
  __syncthreads();
  if (threadIdx.x == 0 &&
      add_acquire_release_device(&self(h.local).num_prepared_ctas, 1) == gridDim.x - 1) {
    fence_system();
    post_address(h.local, s, kDestRank);
    post_address(h.local, s, kDestRow);
  }
}

// Waits until all CTAs of this GPU have written their part of the handle. A barrier must follow.
__device__ void await_own_routes(const Hosts& h, CtaState& s) {
  if (threadIdx.x != 0) return;
  // Partner: the counting in assign_rows().
  wait_until(h.local, s, kWaitOwn, h.local.rank,
             [&] { return load_acquire_system(&self(h.local).num_prepared_ctas) == gridDim.x; });
}

// --- Rows ----------------------------------------------------------------------------------------

// Where the routes and rows of a rank's parcel lie for this GPU.
struct Source {
  const int32_t* dest_rank;  // of the parcel's first token
  const int32_t* dest_row;
  const std::byte* window;  // null: the rank is here, and its rows are in its tensors

  __device__ Source(const DispatchParams& p, const Hosts& h, const CtaState& s, int rank,
                    const Parcel& parcel)
      : window(h.is_here(rank) ? nullptr : window_of(h, rank, parcel.half(), kRequests)) {
    int64_t first = int64_t{parcel.first_token} * h.top_k;
    if (window != nullptr) {
      dest_rank = reinterpret_cast<const int32_t*>(window + h.rounds.dest_rank_at);
      dest_row = reinterpret_cast<const int32_t*>(window + h.rounds.dest_row_at);
      first = int64_t{parcel.first_slot} * h.top_k;
    } else if (rank == h.rank) {
      dest_rank = p.dest_rank;
      dest_row = p.dest_row;
    } else {
      dest_rank = s.buffer<const int32_t>(h.local_of[rank], kDestRank);
      dest_row = s.buffer<const int32_t>(h.local_of[rank], kDestRow);
    }
    dest_rank += first;
    dest_row += first;
  }
};

// Pulls some slices of this rank's rows of a parcel. Whole warp. `kRouted`: the call writes the
// handle.
template <bool kRouted>
__device__ void pull_parcel(const DispatchParams& p, const Hosts& h, const HostsState& hs,
                            CtaState& s, const Pull& pull, const Parcel& parcel) {
  if (parcel.size() == 0) return;
  const int rank = pull.rank;
  const bool here = h.is_here(rank);
  if (!here && !await_window(h, hs, s, rank, parcel)) return;
  const int first_slice = pull.begin(h, p.num_slices);
  const int end_slice = pull.end(h, p.num_slices);
  const Source source(p, h, s, rank, parcel);
  for (int token = parcel.first_token; token < parcel.end_token; ++token) {
    int row = -1;
    if (lane_id() < h.top_k) {
      const int a = (token - parcel.first_token) * h.top_k + lane_id();
      if (source.dest_rank[a] == h.rank) row = source.dest_row[a];
    }
    const uint32_t mask = __ballot_sync(kFullWarp, row >= 0);
    if (kRouted && pull.part == 0 && row >= 0) {
      p.row_source[row] = (rank * h.num_tokens + token) * h.top_k + lane_id();
    }
    if (mask == 0) continue;
    for (int n = first_slice; n < end_slice; ++n) {
      const Slice slice(p, rank, token * p.num_slices + n);
      const SlicedLeaf& leaf = p.leaves[slice.leaf];
      const std::byte* from;
      if (here) {
        const auto* tokens =
            rank == h.rank ? leaf.tokens
                           : s.buffer<const std::byte>(h.local_of[rank], kFirstLeaf + slice.leaf);
        from = slice.in(tokens, p);
      } else {
        from = source.window + h.leaves[slice.leaf].at + parcel.slot_of(token) * leaf.row_bytes +
               slice.offset;
      }
      with_access(leaf.access_bytes, [&](auto access) {
        Values<decltype(access)> values;
        values.load(from, slice.bytes);
        values.store(leaf.rows + slice.offset, leaf.row_bytes, slice.bytes, row, mask);
      });
    }
  }
  if (!here) drain<false>(h, rank, parcel.half());
}

// What the moving warps of each CTA do. Whole warp.
template <bool kRouted, typename Zero>
__device__ void move_rows(const DispatchParams& p, const Hosts& h, const HostsState& hs,
                          CtaState& s, const Zero& zero) {
  const ParcelsOfCta parcels{h};
  const Work work(Tile{0, 0, 0, 1}, parcels.size() * Pull::per_parcel(h), p.padding);
  const auto pull_one = [&](int item) {
    const Pull pull(h, item);
    pull_parcel<kRouted>(p, h, hs, s, pull, parcels[pull.parcel]);
  };
  run_work(work, s, pull_one, zero);
}

// Everything after the exchange is open and the routes of this host's ranks are known. All threads.
// `goes_to`: the host of an assignment.
template <bool kRouted, typename GoesTo, typename Zero>
__device__ void exchange_rows(const DispatchParams& p, const Hosts& h, const HostsState& hs,
                              CtaState& s, const GoesTo& goes_to, const Zero& zero) {
  enter(s, kMoving);
  if (warp_id() == kRelayWarp) {
    run_relay(h, hs, s);
  } else if (warp_id() >= kMovingWarps) {
    run_push(
        h, hs, s, [](const Parcel&, int) {},
        [&](const Parcel& parcel, int host) {
          put_rows(h, parcel, host, goes_to);
          put_routes(h, hs, parcel, host);
        });
  } else {
    move_rows<kRouted>(p, h, hs, s, zero);
  }
  // Words carry their own flags, and rows that this rank has loaded have been stored here.
  finish_between_hosts<false>(h, hs, s);
}

__device__ void dispatch(const DispatchParams& p, const Hosts& h, CtaState& s, HostsState& hs) {
  const Exchange& x = p.exchange;
  const Opening opening(h.local);
  load_epochs(h, hs);
  const Routing routing(dynamic_shared_memory<uint32_t>(), x.num_experts);
  const Chunk chunk(x.num_tokens);
  if (!open(h.local, s, opening)) return;
  if (threadIdx.x == 0) s.next_item = kMovingWarps;
  enter(s, kRouting);
  if (blockIdx.x == 0) post(h.local, s, leaf_addresses(p));
  const auto goes_to = [&](int a) {
    const int id = p.topk_idx[a];
    return id >= 0 && id < x.num_experts ? h.host_of[x.local_experts.quotient(id)] : -1;
  };
  // The counts first: all ranks wait for them, and for rows only when they have their routes.
  count_and_send_headers(p, h, hs, routing, chunk);
  push_rows_ahead(h, chunk, [&](const Parcel& parcel, int host, const ShareOfRow& share) {
    put_rows(h, parcel, host, goes_to, share);
  });
  enter(s, kAgreeing);
  if (!receive_headers(h, hs, s)) return;
  enter(s, kRouting);
  add_counts(p, h, hs, routing);
  __syncthreads();
  place_groups(p, routing);
  __syncthreads();
  assign_rows(p, h, s, routing, chunk);
  const auto put = [&](const Parcel& parcel, int host) { put_routes(h, hs, parcel, host); };
  const bool has_own_routes = h.rounds.are_parcels_tokens();
  if (has_own_routes) push_ahead(h, chunk, put);
  enter(s, kAgreeing);
  await_own_routes(h, s);
  if (!receive_addresses(h.local, s, leaf_addresses(p) | kRoutesOfPeers)) return;
  if (!has_own_routes) push_ahead(h, chunk, put);
  exchange_rows<true>(p, h, hs, s, goes_to,
                      [&](int64_t first_row) { zero_padding(p, routing, first_row); });
}

__device__ void dispatch_along(const DispatchParams& p, const Hosts& h, CtaState& s,
                               HostsState& hs) {
  const Opening opening(h.local);
  load_epochs(h, hs);
  if (!open(h.local, s, opening)) return;
  if (threadIdx.x == 0) s.next_item = kMovingWarps;
  enter(s, kRouting);
  const uint32_t addresses = leaf_addresses(p) | kRoutesOfPeers;
  if (blockIdx.x == 0) {
    post(h.local, s, addresses);
    send_headers(h, hs, nullptr, 0);
  }
  const auto goes_to = [&](int a) { return p.dest_rank[a] < 0 ? -1 : h.host_of[p.dest_rank[a]]; };
  push_ahead(h, [&](const Parcel& parcel, int host) {
    put_rows(h, parcel, host, goes_to);
    put_routes(h, hs, parcel, host);
  });
  enter(s, kAgreeing);
  if (!receive_headers(h, hs, s) || !receive_addresses(h.local, s, addresses)) return;
  exchange_rows<false>(p, h, hs, s, goes_to, [&](int64_t first_row) {
    zero_rows(p, first_row, rows_to_zero(p.exchange, p.padding, p.row_source, first_row));
  });
}

__global__ void __launch_bounds__(kThreads, 1)
    hosts_dispatch_kernel(const __grid_constant__ HostsDispatchParams p) {
  __shared__ CtaState s;
  __shared__ HostsState hs;
  dispatch(p.call, p.hosts, s, hs);
  leave_between_hosts(p.hosts, s, [&](const Team& spoilers) { spoil_results(p.call, spoilers); });
}

__global__ void __launch_bounds__(kThreads, 1)
    hosts_dispatch_along_kernel(const __grid_constant__ HostsDispatchParams p) {
  __shared__ CtaState s;
  __shared__ HostsState hs;
  dispatch_along(p.call, p.hosts, s, hs);
  leave_between_hosts(p.hosts, s, [&](const Team& spoilers) { spoil_rows(p.call, spoilers); });
}

}  // namespace

Kernel hosts_dispatch(int num_experts) {
  return {reinterpret_cast<const void*>(&hosts_dispatch_kernel), routing_bytes(num_experts)};
}

Kernel hosts_dispatch_along() {
  return {reinterpret_cast<const void*>(&hosts_dispatch_along_kernel), 0};
}

}  // namespace freeio::cuda
