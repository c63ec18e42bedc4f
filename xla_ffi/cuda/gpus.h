// The engine's state in this process: its GPUs, its settings, and what has failed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/layout.h"
#include "core/status.h"
#include "cuda/params.h"
#include "pod/pod.h"

namespace freeio::cuda {

class Peers;

// Seconds that a kernel waits for a peer; holds for kernels that already wait, too.
void set_timeout(double seconds);

// Multiprocessors that a kernel may use; 0: the default.
void set_num_sms(int64_t num_sms);

// Makes the GPU blocks of these GPUs (CUDA ordinals; their numbers are their places here), lets
// each access the others' memory, and loads every kernel on each: lazy loading would wait for
// kernels that wait for their peers. For a program of one process. Once started: nothing.
Status start(const std::vector<int>& ordinals);

// A GPU of this host that takes part in a program of several processes.
struct PodGpu {
  int number;  // the same in all processes
  int process;
  int ordinal;  // CUDA's, in that process
};

// The same for a program of several processes; all of them must call it. Waits until the GPU
// blocks of all are mapped by all, at most as long as for an exchange.
Status join(pod::Pod& pod, int process, const std::vector<PodGpu>& gpus);

// The counterpart of join(): waits for the kernels that run, and unmaps what the peers have shown.
// Failures that take_failure() has not returned by then are kept for it.
Status leave();

// Which start() or join() the GPUs' memory is of: 1, 2, ... Launches that XLA captured under an
// earlier one name memory that is there no more.
uint64_t generation();

// Bytes of device memory.
struct Memory {
  int64_t owned_bytes = 0;   // by the engine, on each GPU
  int64_t mapped_bytes = 0;  // of other processes
};
Memory memory();

// The number of this process's GPU with this ordinal; -1: the engine does not have it.
int gpu_number(int ordinal);

// A group's exchange as its member on one GPU sees it.
struct Member {
  std::vector<int> gpus;  // of the group, by rank
  int rank;
  uint32_t mesh_device;  // this member's index in the mesh
};

// What a call of the group needs of its own GPU, and of this process.
struct Connection {
  const HostBlock* host = nullptr;  // stays good until the process ends
  Peers* peers = nullptr;           // that are told of the buffers; null: none in other processes
  uint32_t num_ctas = 0;            // of its kernels
};

// Changes whenever what describe() says may have changed. Never 0.
uint64_t engine_version();

// Makes all calls ask again what they have asked before.
void outdate_calls();

// Fills all of `exchange` but the signature, the device and what is posted.
Status describe(const Layout& layout, const Member& member, Exchange& exchange,
                Connection& connection);

// Seconds that are waited for a peer.
double timeout();

// Whether an exchange has failed on the GPU, and what its users are told of it.
inline bool has_failure(const HostBlock& host) {
  return static_cast<const volatile Failure&>(host.failure).step != kNone;
}
Status failure_of(const HostBlock& host);

// Whether GPUs (numbers; below 0: of other hosts; none: any of this process's) can make an
// exchange, as far as this process knows: an error if one has failed on any of those that are its
// own, or if none of them is. All GPUs of a program are asked about at once, so that XLA stops it
// on all or on none. Calls nothing of CUDA, and locks nothing where there is no error.
Status state_of(const std::vector<int64_t>& gpus);

// What became of an exchange on one of this process's GPUs that failed, once for each GPU; empty:
// nothing new. Later calls there, and state_of(), return the same as an error.
std::string take_failure();

// Who waits for whom on one of this process's GPUs, once a wait has lasted
// patience_in_seconds() and whenever it has become twice as long; empty: nothing new.
std::string take_note();

}  // namespace freeio::cuda
