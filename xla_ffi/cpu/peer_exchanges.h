// The exchanges of this process's ranks with ranks of other processes.
//
// Each process posts the calls of its ranks (the addresses of their operands) to the others. When
// it has the calls of all ranks of a group, it reads rows straight from the others' tensors, fills
// the results of its own ranks, and tells the others that it is done. It returns its buffers to XLA
// when all others are done. A process that stops waiting earlier first says so in its control
// block. A peer looks there after it has read rows, and uses them only if that process still waits.
//
// Rows move among the processes of a host alone. Where a group spans hosts, its ranks meet here,
// and XLA's collectives move the rows (see Meet). So an exchange of rows looks only at processes of
// this host, and a meeting looks at all.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/status.h"
#include "cpu/after_unlock.h"
#include "cpu/call_name.h"
#include "cpu/group_runs.h"
#include "cpu/instance_name.h"
#include "cpu/mail.h"
#include "cpu/peer_memory.h"
#include "cpu/session.h"
#include "cpu/wire.h"
#include "pod/guest.h"
#include "pod/pod.h"

namespace freeio::cpu {

// Which process has each rank of a group, for one instance. This is not known before the first
// exchange. So the calls of the first exchange are posted to all processes, and later calls only to
// the group's processes.
struct GroupProcesses {
  std::vector<int> of_rank;  // empty: not known yet. Guarded by the mutex of PeerExchanges
};

class PeerSession;

// Locks are taken in this order: first that of a Rendezvous, then the mutex of PeerExchanges, then
// the locks of the pod's links, of the deadlines, and of the instances' names. No lock is taken
// while one of the last three is held.
class PeerExchanges final : public pod::Guest {
 public:
  // `control_blocks`: of the pod's other processes, by number.
  PeerExchanges(pod::Pod& pod, const std::map<int, RemoteControlBlock>& control_blocks);

  // Throws std::runtime_error if the memory of another process cannot be read. Without this call
  // the first exchange would fail.
  void try_to_read() const;

  // Those of the pod that this process joined last; null: it has joined none. Never freed, like the
  // pod.
  static PeerExchanges* current();
  static void make_current(std::unique_ptr<PeerExchanges> exchanges);

  // Whether all ranks of the group are known to be in this process.
  bool is_local(const GroupProcesses& group);

  // Begins the next exchange of an instance and a group in a run. `spans_hosts`: it is a meeting of
  // ranks on several hosts. `run`: XLA's id in this process. `forget` is called when the exchange
  // is complete, before the `done` of any of its ranks.
  std::shared_ptr<Session> open(const InstanceName& name, bool spans_hosts, int64_t group,
                                int64_t run, const Layout& layout, std::vector<int64_t> devices,
                                std::shared_ptr<GroupProcesses> processes,
                                std::function<void()> forget);

  // Adds the groups of an instance. `groups`: mesh device indices, a group after the other, by
  // rank.
  void add_groups(const InstanceName& name, int64_t num_ranks, const std::vector<int64_t>& groups);

  // A call of a mesh device has failed in a run, which will end the device's program. Called before
  // XLA gets the error. After it, the peers in the device's other groups do not wait for the device
  // in that run, and do not take calls of its next run for calls of that run. `run`: XLA's id in
  // this process.
  void device_failed(uint64_t module, int64_t run, int64_t device, const Status& why);

  void received(int process, std::string_view text, pod::UniqueFd file) override;
  void gone(int process, pod::Departure how) override;
  void leaving() override;

 private:
  friend class PeerSession;  // shares the mutex

  struct Peer {
    PeerMemory memory;  // is read only if the process is on this host
    bool is_here;
    std::optional<pod::Departure> departure;  // empty: it takes part
  };
  struct ProgramGroups {
    int64_t num_ranks;
    std::vector<int64_t> devices;
  };

  // The mutex must be locked for all below.
  void deliver(int process, Message&& message, AfterUnlock& after);
  void send(int process, const Message& message);
  std::shared_ptr<PeerSession> find(const CallName& name) const;
  std::vector<std::shared_ptr<PeerSession>> open_sessions() const;
  void remove(const CallName& name);
  GroupRuns& runs_of(const RunName& name) { return runs_[{name.program, name.group}]; }
  // This process gives up what it has not done of the run.
  void run_failed(const RunName& name, const Status& why, const std::vector<int>& audience);
  void run_failed_at(int process, const RunName& name, const std::string& text, AfterUnlock& after);
  // An exchange of the run is complete in all its processes.
  void succeeded(const RunName& name);
  void compare_programs(const RunName& name, AfterUnlock& after);

  // For messages to users.
  std::string who(int process) const { return pod_.who(process); }
  std::string elsewhere_note() const;  // for ranks that may be on another host
  std::string waiting_in(int process, const std::string& here) const;

  pod::Pod& pod_;
  const int process_;

  // Guards all below, the state of all sessions, and every GroupProcesses. It is held while
  // messages are sent, so that they leave in the order of the events here. It is not held while
  // `forget` or the `done` of a rank is called.
  std::mutex mutex_;
  bool has_left_ = false;
  std::map<int, Peer> peers_;  // by process. The keys never change; `memory` needs no lock
  std::map<uint64_t, std::map<uint64_t, ProgramGroups>> groups_;  // by module and program
  std::map<std::pair<uint64_t, int64_t>, GroupRuns> runs_;        // by program and group
  std::map<CallName, std::shared_ptr<PeerSession>> sessions_;     // those that are not over
  Mail mail_;
};

}  // namespace freeio::cpu
