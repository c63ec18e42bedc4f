// GPUs of this process: the memory that the engine owns of each, and the links between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "core/status.h"
#include "cuda/gpu_block.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "cuda/overlap.h"
#include "cuda/timeline.h"

namespace freeio::cuda {

// Deleters of what cudaMalloc() and cudaHostAlloc() gave.
struct FreeDevice {
  void operator()(void* pointer) const;
};
struct FreeHost {
  void operator()(void* pointer) const;
};

// Memory of a GPU's blocks, one for each lane. Where other processes take part it is `allocation`,
// which they can map, and `mapping`. Else it is `own`.
struct BlockMemory {
  std::unique_ptr<void, FreeDevice> own;
  Allocation allocation;
  Mapping mapping;
  size_t bytes = 0;
  int64_t block_bytes = 0;  // of each block

  // Of the first lane.
  GpuBlock* get() const {
    return static_cast<GpuBlock*>(own != nullptr ? own.get() : mapping.base());
  }
};

// The wait that take_note() read last in a lane.
struct KnownWait {
  Wait last{};
  double next_note = 0;  // seconds; it reports a wait that has lasted longer
};

// One GPU of this process.
struct Gpu {
  int ordinal = 0;
  BlockMemory block;
  std::unique_ptr<HostBlock, FreeHost> host;
  std::unique_ptr<Overlap> overlap;
  int num_sms = 0;
  bool is_failure_reported = false;  // take_failure() has returned it
  KnownWait waits[kLanes];
#ifdef FREEIO_STAMPS
  std::unique_ptr<void, FreeDevice> timelines;  // a Timeline for each lane and multiprocessor
  Timeline* timelines_of(Lane lane) const {
    return static_cast<Timeline*>(timelines.get()) + lane * num_sms;
  }
#endif
};

// Makes the blocks of this process's GPUs, lets each GPU access the memory of the others, and loads
// every kernel on each. `ordinals`: CUDA's, by GPU number. `num_gpus`: of all processes. `shared`:
// whether other processes take part.
Status make_gpus(const std::map<int, int>& ordinals, int num_gpus, bool shared, uint64_t timeout_ns,
                 std::map<int, Gpu>& gpus);

// Loads a kernel on the calling thread's GPU, and lets it have its shared memory.
// `shared_bytes_of_gpu`: the most that a CTA can have there.
Status load_kernel(const Kernel& kernel, int shared_bytes_of_gpu);

// Whether NVLink leads from one GPU to another (CUDA ordinals).
bool has_link(int from, int to);

}  // namespace freeio::cuda
