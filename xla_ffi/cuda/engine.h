// The engine's state in this process: one control block for each GPU, mapped by all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/layout.h"
#include "core/status.h"
#include "cuda/control.h"

namespace freeio::cuda {

// Seconds that a kernel waits for a peer; holds for kernels that already wait, too.
void set_timeout(double seconds);

// Multiprocessors that a kernel may use; 0: the default.
void set_num_sms(int64_t num_sms);

// Makes the control blocks of these GPUs (CUDA ordinals), lets each access the others' memory, and
// loads every kernel on each: lazy loading would wait for kernels that wait for their peers. Again
// for the same GPUs: nothing.
Status start(const std::vector<int>& ordinals);

// Whether GPU `from` can map the memory of GPU `to` (CUDA ordinals).
bool can_access_peer(int from, int to);

// Bytes of device memory that the engine owns on each GPU.
int64_t device_bytes();

// A group's exchange as its member on one GPU sees it.
struct Member {
  std::vector<int> ordinals;  // of the group's GPUs, by rank
  int rank;
  uint32_t mesh_device;  // this member's index in the mesh
  const uint32_t* device;
};

// Fills all of `exchange` but the signature's op, instance and rows. An error if this or an earlier
// exchange on the GPU has failed.
Status describe(const Layout& layout, const Member& member, Exchange& exchange);

// Launches a kernel on this member's GPU. `stream` is a cudaStream_t.
Status launch(const void* function, const Exchange& exchange, void* params, size_t shared_bytes,
              void* stream);

}  // namespace freeio::cuda
