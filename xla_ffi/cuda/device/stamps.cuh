// Time stamps of a CTA's phases (timeline.h). In a build without FREEIO_STAMPS these functions are
// empty, so that the kernels have the same instructions as without the calls.
//
// The first thread keeps the time. A phase that all threads enter behind a barrier begins for all
// of them at once. Where there is no barrier, it begins when the first thread comes to it.
#pragma once

#include "cuda/device/cta.cuh"
#include "cuda/device/memory_order.cuh"
#include "cuda/params.h"

namespace freeio::cuda {

#ifdef FREEIO_STAMPS

__device__ inline void begin_timeline(CtaState& s) {
  if (threadIdx.x != 0) return;
  s.timeline = {};
  s.timeline.begin = s.phase_begin = nanoseconds();
  s.phase = kOpening;
}

__device__ inline void enter(CtaState& s, Phase phase) {
  if (threadIdx.x != 0) return;
  const uint64_t now = nanoseconds();
  s.timeline.spent[s.phase] += now - s.phase_begin;
  s.phase_begin = now;
  s.phase = phase;
}

__device__ inline void end_timeline(const Exchange& x, CtaState& s) {
  enter(s, kFinishing);
  if (threadIdx.x != 0) return;
  s.timeline.end = s.phase_begin;
  x.timelines[blockIdx.x] = s.timeline;
}

#else

__device__ inline void begin_timeline(CtaState&) {}
__device__ inline void enter(CtaState&, Phase) {}
__device__ inline void end_timeline(const Exchange&, CtaState&) {}

#endif

}  // namespace freeio::cuda
