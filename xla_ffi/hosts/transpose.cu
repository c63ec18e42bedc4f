// combine_transpose between hosts: the gradients of combine by the rows and by the weights.
//
// The cotangent of a token goes to the experts as a row of a dispatch does, with routes and
// weights. The expert's rank stores weight * x to each of the token's rows here. The dot products
// go back: to a rank of this host straight into its result, else to the rail, which puts those of a
// round together before it gives the credit for it.
#include "cuda/device/elements.cuh"
#include "cuda/device/end.cuh"
#include "cuda/device/opening.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/shared_memory.cuh"
#include "hosts/device/parcels.cuh"
#include "hosts/kernels.h"

namespace freeio::cuda {
namespace {

// Dot products of this CTA's pulls, where several warps take parts of the same rows. The warp that
// comes last adds them up, in order of the parts.
template <typename Accumulator>
struct DotsOfParts {
  uint64_t* ended;  // for each pull: its parts that have ended
  Accumulator* dots;
  int per_pull;  // assignments
  int parts;

  __device__ DotsOfParts(const Hosts& h, void* shared)
      : per_pull(h.rounds.parcel_tokens * h.top_k), parts(h.rounds.pull_parts) {
    ended = static_cast<uint64_t*>(shared);
    dots = reinterpret_cast<Accumulator*>(ended + num_pulls(h));
  }
  __device__ static int num_pulls(const Hosts& h) { return ParcelsOfCta{h}.size() * h.num_ranks; }
  // All threads; a barrier must follow.
  __device__ void begin(const Hosts& h) const {
    if (parts == 1) return;
    for (int i = static_cast<int>(threadIdx.x); i < num_pulls(h); i += kThreads) ended[i] = 0;
  }
  __device__ static int number(const Hosts& h, const Pull& pull) {
    return pull.parcel * h.num_ranks + pull.rank;
  }
  __device__ Accumulator& of(const Hosts& h, const Pull& pull, int assignment, int part) const {
    return dots[(number(h, pull) * per_pull + assignment) * parts + part];
  }
  // Says that a part has ended. Whether it was the last one. Whole warp.
  __device__ bool end(const Hosts& h, const Pull& pull) const {
    __syncwarp();
    uint64_t before = 0;
    if (lane_id() == 0) before = add_acquire_release_block(&ended[number(h, pull)], 1);
    return __shfl_sync(kFullWarp, static_cast<int>(before), 0) == parts - 1;
  }
};

// How one warp pulls cotangents.
template <typename Element, int kCount>
struct CotangentWarp {
  using Accumulator = typename Element::Accumulator;
  using R = Raw<Element, kCount>;
  static constexpr int kStep = kWarpSize * kCount;
  static constexpr int kRows = 4;     // of a token for which one read of x is enough
  static constexpr int kColumns = 2;  // steps of a row that are loaded together

  const CombineTransposeParams& p;
  const Hosts& h;
  const HostsState& hs;
  CtaState& s;
  const DotsOfParts<Accumulator>& dots_of;

  // Where a rank's parcel lies for this GPU, and where its dot products go.
  struct Place {
    const int32_t* dest_rank;  // of the parcel's first token
    const int32_t* dest_row;
    const Accumulator* weights;  // null: none
    const Element* x;
    Accumulator* dots;
  };

  __device__ Place place_of(int rank, const Parcel& parcel) const {
    Place place = {};
    int64_t token = parcel.first_token;
    const bool has_weights = h.rounds.weight_bytes > 0;
    if (rank == h.rank) {
      place = {h.dest_rank, h.dest_row, static_cast<const Accumulator*>(h.weights),
               static_cast<const Element*>(p.tokens), static_cast<Accumulator*>(p.weight_grads)};
    } else if (h.is_here(rank)) {
      const int local = h.local_of[rank];
      place = {s.buffer<const int32_t>(local, kDestRank), s.buffer<const int32_t>(local, kDestRow),
               has_weights ? s.buffer<const Accumulator>(local, kWeights) : nullptr,
               s.buffer<const Element>(local, kFirstLeaf),
               p.weight_grads != nullptr ? s.buffer<Accumulator>(local, kWeightGrads) : nullptr};
    } else {
      const std::byte* const window = window_of(h, rank, parcel.half(), kRequests);
      const Rounds& r = h.rounds;
      token = parcel.first_slot;
      place = {reinterpret_cast<const int32_t*>(window + r.dest_rank_at),
               reinterpret_cast<const int32_t*>(window + r.dest_row_at),
               has_weights ? reinterpret_cast<const Accumulator*>(window + r.weights_at) : nullptr,
               reinterpret_cast<const Element*>(window + h.leaves[0].at),
               p.weight_grads != nullptr
                   ? reinterpret_cast<Accumulator*>(window_of(h, rank, parcel.half(), kOutbox))
                   : nullptr};
    }
    const int64_t a = token * h.top_k;
    place.dest_rank += a;
    place.dest_row += a;
    if (place.weights != nullptr) place.weights += a;
    if (place.dots != nullptr) place.dots += a;
    place.x += token * p.width;
    return place;
  }

  // Some rows of one token.
  struct Rows {
    int64_t rows[kRows];
    int assignments[kRows];
    Accumulator weights[kRows];
    Accumulator dots[kRows];
    int count;
  };

  // Loads are made before stores, as the compiler cannot tell that these change nothing.
  __device__ void serve(const Element* x, Rows& rows, int first, int end) const {
    for (int begin = first + lane_id() * kCount; begin < end; begin += kColumns * kStep) {
      R tokens[kColumns];
      R outputs[kColumns][kRows];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = begin + c * kStep;
        if (column >= end) break;
        tokens[c] = load_raw<Element, kCount>(x + column);
        if (p.weight_grads == nullptr) continue;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= rows.count) break;
          outputs[c][i] = load_raw<Element, kCount>(static_cast<const Element*>(p.expert_out) +
                                                    rows.rows[i] * p.width + column);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = begin + c * kStep;
        if (column >= end) break;
        Accumulator values[kCount];
        widen<Element, kCount>(tokens[c], values);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= rows.count) break;
          if (p.rows != nullptr) {
            Accumulator products[kCount];
#pragma unroll
            for (int j = 0; j < kCount; ++j) products[j] = rows.weights[i] * values[j];
            store_raw<Element, kCount>(
                static_cast<Element*>(p.rows) + rows.rows[i] * p.width + column,
                round_to<Element, kCount>(products));
          }
          if (p.weight_grads != nullptr) {
            Accumulator expert_values[kCount];
            widen<Element, kCount>(outputs[c][i], expert_values);
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
              rows.dots[i] = fma(expert_values[j], values[j], rows.dots[i]);
            }
          }
        }
      }
    }
  }

  // The columns of a part of a pull.
  __device__ int part_begin(const Pull& pull) const { return pull.begin(h, steps()) * kStep; }
  __device__ int part_end(const Pull& pull) const {
    return min(pull.end(h, steps()) * kStep, p.width);
  }
  __device__ int steps() const { return (p.width + kStep - 1) / kStep; }

  __device__ void pull_token(const Place& place, const Pull& pull, int number) const {
    const int first = number * h.top_k;
    int rank = -1;
    int row = -1;
    Accumulator weight = 0;
    if (lane_id() < h.top_k) {
      rank = place.dest_rank[first + lane_id()];
      row = place.dest_row[first + lane_id()];
      if (place.weights != nullptr) weight = place.weights[first + lane_id()];
    }
    for (uint32_t mask = __ballot_sync(kFullWarp, rank == h.rank); mask != 0;) {
      Rows rows = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int k = mask != 0 ? __ffs(static_cast<int>(mask)) - 1 : 0;
        rows.count += mask != 0;
        mask &= mask - 1;
        rows.assignments[i] = k;
        rows.rows[i] = __shfl_sync(kFullWarp, row, k);
        rows.weights[i] = __shfl_sync(kFullWarp, weight, k);
      }
      serve(place.x + int64_t{number} * p.width, rows, part_begin(pull), part_end(pull));
      if (p.weight_grads == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
          rows.dots[i] += __shfl_xor_sync(kFullWarp, rows.dots[i], distance);
        }
        if (i >= rows.count || lane_id() != 0) continue;
        const int assignment = first + rows.assignments[i];
        Accumulator& dot =
            dots_of.parts > 1 ? dots_of.of(h, pull, assignment, pull.part) : place.dots[assignment];
        dot = rows.dots[i];
      }
    }
  }

  // Adds up the parts of the dot products of a pull.
  __device__ void add_parts(const Place& place, const Pull& pull, const Parcel& parcel) const {
    for (int i = lane_id(); i < parcel.size() * h.top_k; i += kWarpSize) {
      if (place.dest_rank[i] != h.rank) continue;
      Accumulator dot = 0;
      for (int part = 0; part < dots_of.parts; ++part) dot += dots_of.of(h, pull, i, part);
      place.dots[i] = dot;
    }
    __syncwarp();
  }

  __device__ void pull_parcel(const Pull& pull, const Parcel& parcel) const {
    if (parcel.size() == 0) return;
    const int rank = pull.rank;
    const bool here = h.is_here(rank);
    if (!here && !await_window(h, hs, s, rank, parcel)) return;
    const Place place = place_of(rank, parcel);
    for (int number = 0; number < parcel.size(); ++number) pull_token(place, pull, number);
    if (p.weight_grads != nullptr) {
      if (dots_of.parts > 1 && dots_of.end(h, pull)) add_parts(place, pull, parcel);
      if (rank == h.rank && pull.part == 0) clear_grads_without_row(parcel);
    }
    // The dot products are on the rail.
    if (!here) drain<true>(h, rank, parcel.half());
  }

  // The weights of assignments without a row have gradient zero.
  __device__ void clear_grads_without_row(const Parcel& parcel) const {
    const int end = parcel.end_token * h.top_k;
    for (int a = parcel.first_token * h.top_k + lane_id(); a < end; a += kWarpSize) {
      if (h.dest_rank[a] < 0) static_cast<Accumulator*>(p.weight_grads)[a] = 0;
    }
  }

  // Takes the dot products that came back from a host. Whole warp.
  __device__ void take_grads(const Parcel& parcel, int host) const {
    if (p.weight_grads == nullptr) return;
    const auto* dots =
        reinterpret_cast<const Accumulator*>(window_for(h, host, parcel.half(), kAnswers)) +
        int64_t{parcel.first_slot} * h.top_k;
    const int64_t first = int64_t{parcel.first_token} * h.top_k;
    for (int i = lane_id(); i < parcel.size() * h.top_k; i += kWarpSize) {
      const int rank = h.dest_rank[first + i];
      if (rank >= 0 && h.host_of[rank] == host) {
        static_cast<Accumulator*>(p.weight_grads)[first + i] = dots[i];
      }
    }
    __syncwarp();
  }

  __device__ void zero_padding(int64_t first_row) const {
    uint32_t rest = rows_to_zero(p.exchange, p.padding, p.row_source, first_row);
    for (; rest != 0; rest &= rest - 1) {
      const int64_t row = first_row + __ffs(static_cast<int>(rest)) - 1;
      Element* to = static_cast<Element*>(p.rows) + row * p.width;
      for (int column = lane_id() * kCount; column < p.width; column += kStep) {
        store_raw<Element, kCount>(to + column, R{});
      }
    }
  }

  __device__ void run() const {
    const ParcelsOfCta parcels{h};
    const auto pull_one = [&](int item) {
      const Pull pull(h, item);
      pull_parcel(pull, parcels[pull.parcel]);
    };
    run_work(Work(Tile{0, 0, 0, 1}, parcels.size() * Pull::per_parcel(h), p.padding), s, pull_one,
             [&](int64_t row) { zero_padding(row); });
  }
};

template <typename Element, int kCount>
__device__ void transpose(const CombineTransposeParams& p, const Hosts& h, CtaState& s,
                          HostsState& hs, void* shared_memory) {
  const Opening opening(h.local);
  load_epochs(h, hs);
  if (!open(h.local, s, opening)) return;
  if (threadIdx.x == 0) s.next_item = kMovingWarps;
  enter(s, kRouting);
  const DotsOfParts<typename Element::Accumulator> dots(h, shared_memory);
  dots.begin(h);
  const uint32_t addresses = 1u << kFirstLeaf | 1u << kDestRank | 1u << kDestRow |
                             (p.weights != nullptr ? 1u << kWeights : 0) |
                             (p.weight_grads != nullptr ? 1u << kWeightGrads : 0);
  if (blockIdx.x == 0) {
    post(h.local, s, addresses);
    send_headers(h, hs, nullptr, 0);
  }
  const auto goes_to = [&](int a) { return p.dest_rank[a] < 0 ? -1 : h.host_of[p.dest_rank[a]]; };
  const auto put = [&](const Parcel& parcel, int host) {
    put_rows(h, parcel, host, goes_to);
    put_routes(h, hs, parcel, host);
  };
  push_ahead(h, put);
  enter(s, kAgreeing);
  if (!receive_headers(h, hs, s) || !receive_addresses(h.local, s, addresses)) return;
  enter(s, kMoving);
  const CotangentWarp<Element, kCount> warp{p, h, hs, s, dots};
  if (warp_id() == kRelayWarp) {
    run_relay(h, hs, s);
  } else if (warp_id() >= kMovingWarps) {
    const auto take = [&](const Parcel& parcel, int host) { warp.take_grads(parcel, host); };
    run_push(h, hs, s, take, put);
  } else {
    warp.run();
  }
  // The weights' gradients are in the memory of the ranks of this host; this tells them so.
  finish_between_hosts<true>(h, hs, s);
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    hosts_transpose_kernel(const __grid_constant__ HostsTransposeParams p) {
  __shared__ CtaState s;
  __shared__ HostsState hs;
  transpose<Element, kCount>(p.call, p.hosts, s, hs, dynamic_shared_memory<void>());
  leave_between_hosts(p.hosts, s, [&](const Team& spoilers) {
    const CombineTransposeParams& call = p.call;
    const int64_t row_bytes = call.width * static_cast<int64_t>(sizeof(Element));
    spoil(spoilers, call.rows, call.exchange.capacity * row_bytes);
    const int64_t assignments = int64_t{p.hosts.num_tokens} * p.hosts.top_k;
    spoil(spoilers, call.weight_grads,
          assignments * static_cast<int64_t>(sizeof(typename Element::Accumulator)));
  });
}

}  // namespace

Kernel hosts_transpose(DType dtype, bool wide) {
  Kernel kernel;
  kernel.shared_bytes = kDotsBytes;
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    constexpr int kWide = wide_pack(sizeof(Element));
    kernel.function = wide ? reinterpret_cast<const void*>(&hosts_transpose_kernel<Element, kWide>)
                           : reinterpret_cast<const void*>(&hosts_transpose_kernel<Element, 1>);
  });
  return kernel;
}

}  // namespace freeio::cuda
