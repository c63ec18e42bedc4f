// The engine's state in this process: its GPUs, its settings, and its failures.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/layout.h"
#include "core/status.h"
#include "cuda/params.h"
#include "pod/pod.h"

namespace freeio::cuda {

class Overlap;
class Peers;

// How many seconds a kernel waits for a peer. Also changes the waits that have begun.
void set_timeout(double seconds);

// Multiprocessors that a kernel may use; 0: the default.
void set_num_sms(int64_t num_sms);

// Multiprocessors of an exchange that runs beside compute, if its start does not say how many.
void set_overlap_num_sms(int64_t num_sms);

// Starts the engine for a program of one process. Makes the GPU blocks of these GPUs, lets each GPU
// access the memory of the others, and loads every kernel on each. (A kernel that CUDA loads lazily
// waits for the kernels that run, and these may wait for it.) `ordinals`: CUDA's; a GPU's number is
// its index in this list. Does nothing if the engine has GPUs already.
Status start(const std::vector<int>& ordinals);

// A GPU of this host that takes part in a program of several processes.
struct PodGpu {
  int number;  // the same in all processes
  int process;
  int ordinal;  // CUDA's, in that process
};

// Starts the engine for a program of several processes. All of them must call it. Waits until every
// process has mapped the GPU blocks of all others, at most as long as an exchange waits.
Status join(pod::Pod& pod, int process, const std::vector<PodGpu>& gpus);

// The counterpart of join(). Waits for the kernels that run, and unmaps the memory of the peers.
// take_failure() still returns failures that it has not returned before.
Status leave();

// The number of the start() or join() that made the present GPU blocks: 1, 2, ... A launch that XLA
// captured in an earlier generation has addresses of blocks that no longer exist.
uint64_t generation();

// Bytes of device memory.
struct MemoryUse {
  int64_t owned_bytes = 0;   // by the engine, on each GPU
  int64_t mapped_bytes = 0;  // that other processes own
};
MemoryUse memory_use();

// The number of this process's GPU with this ordinal; -1: the engine does not have it.
int gpu_number(int ordinal);

// One member of a group of GPUs that exchange rows.
struct GroupMember {
  std::vector<int> gpus;  // numbers of the group's GPUs, by rank
  int rank;               // of this member
  uint32_t mesh_device;   // index in the mesh of this member's device
};

// The lane of a call, and what decides how many multiprocessors it gets.
struct LaneShare {
  Lane lane = kSynchronous;
  // What the start asks for; 0: the setting.
  int64_t num_sms = 0;
  // Of a synchronous call: the most that a start of its program asks for. kNoStarts: the program
  // has none.
  int64_t starts_num_sms = kNoStarts;

  static constexpr int64_t kNoStarts = -1;
};

// What a member needs to know of its own GPU and process.
struct Connection {
  const HostBlock* host = nullptr;  // of its GPU; valid until the process ends
  Overlap* overlap = nullptr;       // of its GPU; valid until the process ends
  Peers* peers = nullptr;           // null: all GPUs of the group are in this process
  uint32_t num_ctas = 0;            // of a kernel
};

// Changes whenever the results of find_group() or make_plan() may have changed. Never 0.
uint64_t engine_version();

// Changes engine_version(), so that every call prepares itself again before its next run.
void outdate_calls();

// Finds the GPUs of a group. Fills `exchange` except for the signature, `device` and `posted`.
Status find_group(const Layout& layout, const GroupMember& member, const LaneShare& share,
                  Exchange& exchange, Connection& connection);

// The same for a custom call that exchanges nothing, on this process's GPU with this ordinal. Fills
// `host` and `overlap`.
Status find_gpu(int ordinal, Connection& connection);

#ifdef FREEIO_STAMPS
// The timelines of the last synchronous exchange on this process's GPU with this ordinal. Waits for
// the exchanges that run. They are returned once: those of CTAs that have run since the last call.
Status take_timelines(int ordinal, std::vector<Timeline>& timelines);
#endif

// How many seconds an exchange waits for a peer.
double timeout();

// Whether an exchange has failed on the GPU of this host block.
inline bool has_failure(const HostBlock& host) {
  return static_cast<const volatile Failure&>(host.failure).step != kNone;
}
// The error that its users get. OK: no exchange has failed.
Status failure_of(const HostBlock& host);

// Whether these GPUs can make an exchange, as far as this process knows. An error if an exchange
// has failed on any of them that is in this process, or if none of them is in this process. Called
// with all GPUs of a program, so that XLA stops the program on all of them or on none. Without an
// error it calls nothing of CUDA and takes no lock. `gpus`: numbers; -1: a GPU of another host.
// Empty: all GPUs of this process.
Status state_of(const std::vector<int64_t>& gpus);

// The error of an exchange that has failed on one of this process's GPUs. Returns it once for each
// GPU; empty: there is nothing new. Later calls on that GPU, and state_of(), return the same error.
std::string take_failure();

// Which rank waits for which on one of this process's GPUs. Reports a wait that has lasted
// patience_in_seconds(), and again whenever it has become twice as long. Empty: nothing new.
std::string take_note();

}  // namespace freeio::cuda
