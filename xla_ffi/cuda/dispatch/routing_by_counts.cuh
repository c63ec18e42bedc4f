// Routing by counts. Each rank tells all ranks how many rows it has for each expert.
#pragma once

#include "cuda/device/waits.cuh"
#include "cuda/dispatch/groups.cuh"

namespace freeio::cuda {

// A rank's CTAs, and with them its tokens, form a few segments. The first CTA of a segment counts
// all assignments of the segment. The other CTAs count those that come before their own chunk. With
// more segments each CTA counts less, but all CTAs have more counts to add up.
struct Segment {
  int number;
  bool is_led;  // by this CTA
  // Assignments that this CTA counts: [begin, end).
  int begin;
  int end;

  __device__ Segment(const DispatchParams& p, const Chunk& chunk) {
    const Exchange& x = p.exchange;
    const auto ctas = static_cast<int>(gridDim.x);
    number = static_cast<int>(blockIdx.x) / p.segment_ctas;
    const int first = number * p.segment_ctas;
    is_led = static_cast<int>(blockIdx.x) == first;
    const int last = min(first + p.segment_ctas, ctas) - 1;
    begin = Chunk(x.num_tokens, first, ctas).begin * x.top_k;
    end = (is_led ? Chunk(x.num_tokens, last, ctas).end : chunk.begin) * x.top_k;
  }
};

// Some of a segment's ids, four at a time.
struct IdQuads {
  static constexpr int kCount = 4;
  static constexpr int kStep = kCount * kThreads;  // quads
  int4 ids[kCount];

  __device__ IdQuads(const DispatchParams& p, const Segment& segment, int first) {
    const auto* quads = reinterpret_cast<const int4*>(p.topk_idx);
    const int end = segment.end / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (const int quad = first + i * kThreads; quad < end) ids[i] = quads[quad];
    }
  }
  // The thread's first quad.
  __device__ static int first_of(const Segment& segment) {
    return segment.begin / 4 + static_cast<int>(threadIdx.x);
  }
};

// This CTA's segment, and the thread's first ids of it.
struct SegmentIds {
  Segment segment;
  IdQuads quads;

  __device__ SegmentIds(const DispatchParams& p, const Chunk& chunk)
      : segment(p, chunk), quads(p, segment, IdQuads::first_of(segment)) {}
};

// Counts this CTA's part of the segment in `next`, for each expert. The CTA that leads the segment
// sends the counts. All threads; a barrier must follow. After it `next` is the number that the
// chunk's first assignment to each expert has in the segment.
__device__ inline void count_and_send(const DispatchParams& p, const CtaState& s,
                                      const Routing& routing, const Segment& segment,
                                      IdQuads quads) {
  const Exchange& x = p.exchange;
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.next[e] = 0;
  }
  __shared__ int all_invalid;
  if (threadIdx.x == 0) all_invalid = 0;
  __syncthreads();
  int invalid = 0;
  const auto count_one = [&](int a, int id) {
    if (a < segment.begin) return;
    if (id >= 0 && id < x.num_experts) {
      atomicAdd(&routing.next[id], 1u);
    } else {
      invalid += id != -1;
    }
  };
  const int num_quads = segment.end / 4;
  for (int first = IdQuads::first_of(segment); first < num_quads; first += IdQuads::kStep) {
    const IdQuads next(p, segment, first + IdQuads::kStep);
#pragma unroll
    for (int i = 0; i < IdQuads::kCount; ++i) {
      const int quad = first + i * kThreads;
      if (quad >= num_quads) break;
      count_one(quad * 4, quads.ids[i].x);
      count_one(quad * 4 + 1, quads.ids[i].y);
      count_one(quad * 4 + 2, quads.ids[i].z);
      count_one(quad * 4 + 3, quads.ids[i].w);
    }
    quads = next;
  }
  const int rest = num_quads * 4 + static_cast<int>(threadIdx.x);
  if (rest < segment.end) count_one(rest, p.topk_idx[rest]);
  if (!segment.is_led) return;
  if (invalid != 0) atomicAdd(&all_invalid, invalid);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < x.num_ranks * x.num_experts; i += kThreads) {
    const int rank = i / x.num_experts;
    const int e = i - rank * x.num_experts;
    store_word(&mailbox_to(x, s, rank).routing[segment.number * x.num_experts + e],
               make_word(s.epoch[rank], routing.next[e]));
  }
  if (threadIdx.x == 0) {
    store_word(&mailbox_to(x, s, x.rank).num_invalid[segment.number],
               make_word(s.epoch[x.rank], static_cast<uint32_t>(all_invalid)));
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < x.num_experts; e += kThreads) {
    routing.next[e] = 0;
  }
}

// Adds up the counts of all ranks: `load`, and in `first` and `earlier` what comes before this
// CTA's segment. `counts`: shared memory for kMaxCounts. All threads; a barrier must follow.
__device__ inline void receive_counts(const DispatchParams& p, CtaState& s, const Routing& routing,
                                      const Segment& segment, uint32_t* counts) {
  constexpr int kBatch = 8;
  const Exchange& x = p.exchange;
  const int segments = p.num_segments;
  const int most = min(x.num_experts, kMaxCounts / (x.num_ranks * segments));
  const int own_experts = x.num_experts / x.num_ranks;
  bool failed = false;
#pragma unroll 1
  for (int begin = 0; begin < x.num_experts; begin += most) {
    const int experts = min(most, x.num_experts - begin);
    const int size = experts * segments * x.num_ranks;
    for (int first = static_cast<int>(threadIdx.x); first < size; first += kBatch * kThreads) {
      const Word* addresses[kBatch];
      int ranks[kBatch];
      Word words[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kThreads;
        if (i >= size) break;
        const int of_expert = i / experts;
        ranks[b] = of_expert / segments;
        const int number = of_expert - ranks[b] * segments;
        const int e = begin + i - of_expert * experts;
        addresses[b] = &mailbox_from(x, s, ranks[b]).routing[number * x.num_experts + e];
      }
      const auto load_from = [&](int some) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (b >= some && first + b * kThreads < size) words[b] = load_word(addresses[b]);
        }
      };
      load_from(0);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kThreads;
        if (i >= size || failed) break;
        const int rank = ranks[b];
        const Step step = rank == x.rank ? kWaitOwn : kWaitCounts;
        failed = !has_arrived(words[b], s.epoch[rank]) && !wait_until(x, s, step, rank, [&] {
          load_from(b);  // those after it come at the same time
          return has_arrived(words[b], s.epoch[rank]);
        });
        counts[i] = value_of(words[b]);
      }
    }
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
      const int own_expert = begin + e - x.rank * own_experts;
      const bool is_own = own_expert >= 0 && own_expert < own_experts;
      uint32_t load = 0;
#pragma unroll 1
      for (int rank = 0; rank < x.num_ranks; ++rank) {
        uint32_t before = 0;
        uint32_t all = 0;
#pragma unroll 1
        for (int i = 0; i < segments; ++i) {
          if (i == segment.number) before = all;
          all += counts[(rank * segments + i) * experts + e];
        }
        if (rank == x.rank) routing.first[begin + e] = load + before;
        if (is_own) routing.earlier[rank * own_experts + own_expert] = load + before;
        load += all;
      }
      routing.load[begin + e] = load;
    }
    if (begin + most < x.num_experts) __syncthreads();
  }
}

// What the caller learns of this rank's ids. One warp.
__device__ inline void store_num_invalid(const DispatchParams& p, CtaState& s) {
  const Exchange& x = p.exchange;
  int invalid = 0;
  if (lane_id() < p.num_segments) {
    const Word* address = &mailbox_from(x, s, x.rank).num_invalid[lane_id()];
    Word word = load_word(address);
    if (wait_word(x, s, kWaitOwn, x.rank, address, word)) {
      invalid = static_cast<int>(value_of(word));
    }
  }
  invalid = __reduce_add_sync(kFullWarp, invalid);
  if (lane_id() == 0) *p.num_invalid = invalid;
}

}  // namespace freeio::cuda
