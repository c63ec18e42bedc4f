// How a kernel ends its exchange, and how it overwrites the results of a failed one.
#pragma once

#include "cuda/device/rank_set.cuh"
#include "cuda/device/stamps.cuh"
#include "cuda/device/waits.cuh"
#include "cuda/params.h"

namespace freeio::cuda {

// Says, once in each kernel, that this CTA no longer reads its peers' buffers. (combine still
// stores to them. Its stores have arrival flags, and the receiving rank waits for all of these.)
// CTA 0 waits until all CTAs of all ranks have said so, and then writes the next epochs. One warp.
// `kPublishes`: a peer that sees this also sees everything that the CTA has stored to it.
template <bool kPublishes>
__device__ void conclude(const Exchange& x, CtaState& s) {
  GpuBlock& block = self(x);
  const int lane = lane_id();
  if (__any_sync(kFullWarp, has_failed(s))) return;
  // Partner: the load below, of this GPU's CTA 0 and of the peers'.
#pragma unroll
  for (int i = 0; i < kRanksPerLane; ++i) {
    if (const int rank = lane + i * kWarpSize; rank < x.num_ranks) {
      uint32_t* finished = &x.gpu_block[rank]->num_finished_ctas[x.gpu[x.rank]];
      if constexpr (kPublishes) {
        add_release_system(finished, 1);
      } else {
        add_relaxed_system(finished, 1);
      }
    }
  }
  if (blockIdx.x != 0) return;
  int gpu[kRanksPerLane];
  uint32_t end[kRanksPerLane];
  bool ended = true;
#pragma unroll
  for (int i = 0; i < kRanksPerLane; ++i) {
    const int rank = lane + i * kWarpSize;
    gpu[i] = x.gpu[rank < x.num_ranks ? rank : x.rank];
    end[i] = block.num_ended_ctas[gpu[i]] + gridDim.x;
    const auto has_ended = [&] {
      const uint32_t finished = load_acquire_system(&block.num_finished_ctas[gpu[i]]);
      return static_cast<int32_t>(finished - end[i]) >= 0;
    };
    ended = ended && (rank >= x.num_ranks || wait_until(x, s, kWaitFinish, rank, has_ended));
  }
  // Not before all have ended: until then a CTA of this GPU may still read the epochs.
  if (!__all_sync(kFullWarp, ended)) return;
#pragma unroll
  for (int i = 0; i < kRanksPerLane; ++i) {
    if (const int rank = lane + i * kWarpSize; rank < x.num_ranks) {
      block.num_ended_ctas[gpu[i]] = end[i];
      block.epoch[gpu[i]] = s.epoch[rank];
    }
  }
  if (lane == 0) block.num_prepared_ctas = 0;
}

// The same at the end of a kernel. All threads.
template <bool kPublishes>
__device__ void finish(const Exchange& x, CtaState& s) {
  __syncthreads();
  enter(s, kFinishing);
  if (warp_id() == 0) conclude<kPublishes>(x, s);
}

// Beginning and end of an exchange in which no kernel accesses a buffer of another rank. Such a
// kernel need not wait until the other ranks have ended. All threads.
__device__ inline void begin_alone(const Exchange& x) {
  if (threadIdx.x == 0) count_around_device(&self(x).num_opened_ctas, gridDim.x - 1);
}
// All threads.
__device__ inline void finish_alone(const Exchange& x, CtaState& s) {
  if (blockIdx.x != 0 || warp_id() != kWarps - 1 || __any_sync(kFullWarp, has_failed(s))) return;
  GpuBlock& block = self(x);
  const int lane = lane_id();
  // Not before all CTAs have looked at the epochs.
  const bool opened = lane != 0 || wait_until(x, s, kWaitOwn, x.rank, [&] {
                        return load_relaxed_device(&block.num_opened_ctas) == 0;
                      });
  const bool have_all = __all_sync(kFullWarp, opened);
#pragma unroll
  for (int i = 0; i < kRanksPerLane; ++i) {
    const int rank = lane + i * kWarpSize;
    if (have_all && rank < x.num_ranks) block.epoch[x.gpu[rank]] = s.epoch[rank];
  }
}

// Sets all bits of a failed exchange's result: it becomes NaN or -1, which cannot be taken for
// data, nor by a later call for a row. The spoilers share the work. All threads.
__device__ inline void spoil(const Team& spoilers, void* result, int64_t bytes) {
  if (result == nullptr) return;
  auto* words = static_cast<uint32_t*>(result);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(uint32_t));
  const int64_t step = static_cast<int64_t>(spoilers.size) * kThreads;
  const int64_t begin = static_cast<int64_t>(spoilers.number) * kThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t i = begin; i < count; i += step) words[i] = ~0u;
  auto* rest = static_cast<uint8_t*>(result) + count * sizeof(uint32_t);
  if (begin < bytes % static_cast<int64_t>(sizeof(uint32_t))) rest[begin] = 0xff;
}

// For a CTA that knows of the failure. Waits until no CTA stores to the results any more, and
// returns the CTAs that spoil them. One thread.
[[gnu::noinline]] __device__ inline Team await_spoiling(const Exchange& x) {
  GpuBlock& block = self(x);
  // An earlier kernel failed: all CTAs know.
  if (load_relaxed_device(&block.are_results_spoiled) != 0) return Team::all();
  const uint32_t number = atomicAdd(&block.num_failing_ctas, 1u);
  fence_system();
  count_around_device(&block.num_leaving_ctas, gridDim.x - 1);
  // All other CTAs come to their end in bounded time: they do not notice the failure, or they wait
  // and then hear of it. This wait is bounded, too, in case a CTA is lost.
  const volatile HostBlock& host = *x.host;
  const uint64_t begin = nanoseconds();
  bool all = false;
  while (!all && nanoseconds() - begin <= 2 * host.timeout_ns) {
    constexpr int kPollsBetweenChecks = 1024;
    for (int poll = 0; !all && poll < kPollsBetweenChecks; ++poll) {
      all = load_relaxed_device(&block.num_leaving_ctas) == 0;
    }
  }
  fence_system();
  const uint32_t failing = load_relaxed_device(&block.num_failing_ctas);
  // The last stores of the others may still be on their way.
  sleep_microseconds<100>();
  atomicExch(&block.are_results_spoiled, 1u);
  return all ? Team{static_cast<int>(number), static_cast<int>(failing)} : Team::all();
}

// Last phase of every kernel. If the exchange has failed, all CTAs that know of it call
// spoil_results(spoilers), once no other CTA stores results. All threads.
template <typename Spoil>
[[gnu::noinline]] __device__ void leave_failed(const Exchange& x, CtaState& s,
                                               const Spoil& spoil_results) {
  if (threadIdx.x == 0) {
    // It may be the failure of another lane or of an earlier exchange, with other peers.
    tell_peers(x);
    s.spoilers = await_spoiling(x);
  }
  __syncthreads();
  spoil_results(s.spoilers);
}
template <typename Spoil>
__device__ void leave(const Exchange& x, CtaState& s, const Spoil& spoil_results) {
  __syncthreads();
  end_timeline(x, s);
  if (has_failed(s)) return leave_failed(x, s, spoil_results);
  if (threadIdx.x == 0) count_around_device(&self(x).num_leaving_ctas, gridDim.x - 1);
}

}  // namespace freeio::cuda
