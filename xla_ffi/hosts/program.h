// What this process knows of a program on several hosts, for groups that span them: which GPUs
// there are, and where their symmetric memory is. Each process has one GPU, which is a PE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/status.h"
#include "hosts/call.h"
#include "pod/pod.h"

namespace freeio::cuda {

struct HostsProgram {
  int pe = 0;       // of this process
  int ordinal = 0;  // CUDA's, of its GPU
  std::vector<int> host_of_pe;
  std::vector<int> gpu_of_pe;  // its number in the engine; -1: it is on another host
  int64_t part_bytes = 0;      // of a window (landing.h)
};

// Makes the symmetric memory, and prepares the kernels. From then on kernels learn which processes
// of the pod have gone. All processes must call it, when the engine has joined the pod and NVSHMEM
// has been started. It waits for the other PEs, without a bound. The memory must not be used before
// all processes have returned from it.
Status join_hosts(pod::Pod& pod, HostsProgram program);

// Puts some of XLA's memory to each PE that only the network reaches, and waits for it, without a
// bound. So what the network needs for that is there before a kernel waits for it: to make it, the
// network may have to wait for kernels. All processes must call it after join_hosts(), before the
// first call.
Status try_network(const void* memory_of_xla, size_t bytes);

// The counterpart. The symmetric memory stays for the next join_hosts(). Returns whether no process
// has gone without a word.
bool leave_hosts();

// What join_hosts() made; null: it was not called, or leave_hosts() was. Valid until the process
// ends.
struct JoinedHosts {
  HostsProgram program;
  Landings landings;
};
const JoinedHosts* joined_hosts();

// What join_hosts() found, in numbers of PEs.
struct Reach {
  std::vector<int> by_link;  // PEs of other hosts whose memory this GPU writes by itself
  std::vector<int> by_network;
  int64_t symmetric_bytes = 0;  // on each GPU
};
Reach reach_of(const JoinedHosts& joined);

}  // namespace freeio::cuda
