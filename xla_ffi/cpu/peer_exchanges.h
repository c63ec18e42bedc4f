// The exchanges of this process's ranks with ranks of the other processes of the host.
//
// Each process posts its ranks' calls (the addresses of their operands) to the others. When the
// calls of all ranks of a group are known, each process fills the results of its own ranks, reading
// rows straight from the others' tensors, and says so. It gives its buffers back to XLA only when
// all others have said so, or after announcing that it does not wait any longer: a peer that reads
// on looks for that announcement before it believes what it has read.
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

// Which process has each rank of a group of one instance. It is not known before the first
// exchange, whose calls are posted to all processes. Later calls go to the group's processes alone.
struct GroupProcesses {
  std::vector<int> of_rank;  // empty: not known yet. Guarded by the mutex of PeerExchanges
};

class PeerSession;

// Locks are taken in this order: that of a Rendezvous, then the mutex here, then those of the pod's
// links, of the deadlines and of the instances' names. No other lock is taken under the last three.
class PeerExchanges final : public pod::Guest {
 public:
  // `control_blocks`: of each of the pod's other processes.
  PeerExchanges(pod::Pod& pod, const std::map<int, RemoteControlBlock>& control_blocks);

  // Throws std::runtime_error where the memory of another process cannot be read. Without this call
  // the first exchange finds out.
  void try_to_read() const;

  // Of the pod that this process joined last; null before it joined one. Never freed, as the pod.
  static PeerExchanges* current();
  static void make_current(std::unique_ptr<PeerExchanges> exchanges);

  bool is_local(const GroupProcesses& group);

  // The next exchange of an instance and a group, which is not known to be in this process alone,
  // in what XLA calls `run` here. `forget` is called when the exchange is complete, before any of
  // its ranks is told.
  std::shared_ptr<Session> open(const InstanceName& name, int64_t group, int64_t run,
                                const Layout& layout, std::vector<int64_t> devices,
                                std::shared_ptr<GroupProcesses> processes,
                                std::function<void()> forget);

  // The groups of an instance's ranks, one after the other, as mesh device indices.
  void add_groups(const InstanceName& name, int64_t num_ranks, const std::vector<int64_t>& groups);

  // A call of a mesh device has failed in what XLA calls `run` here, which ends the device's
  // program. Called before XLA knows. The peers of the device's other groups must not wait for it
  // in that run, nor take calls of its next run for calls of that one.
  void device_failed(uint64_t module, int64_t run, int64_t device, const Status& why);

  void received(int process, std::string_view text, pod::UniqueFd file) override;
  void gone(int process, pod::Departure how) override;
  void leaving() override;

 private:
  friend class PeerSession;  // shares the mutex

  struct Peer {
    PeerMemory memory;
    std::optional<pod::Departure> departure;  // none: it takes part
  };
  struct ProgramGroups {
    int64_t num_ranks;
    std::vector<int64_t> devices;
  };

  // All below: with the mutex locked.
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
  std::string elsewhere_note() const;  // what to say where a rank may be on another host
  std::string waiting_in(int process, const std::string& here) const;

  pod::Pod& pod_;
  const int process_;

  // Guards all below, what changes in the sessions, and every GroupProcesses. It is held while
  // messages are sent, which keeps them in the order of what happened here. It is not held while
  // `forget` or a rank's `done` is called.
  std::mutex mutex_;
  bool has_left_ = false;
  std::map<int, Peer> peers_;  // by process: always the same ones, whose memory needs no lock
  std::map<uint64_t, std::map<uint64_t, ProgramGroups>> groups_;  // by module and program
  std::map<std::pair<uint64_t, int64_t>, GroupRuns> runs_;        // by program and group
  std::map<CallName, std::shared_ptr<PeerSession>> sessions_;     // whose exchange is not over
  Mail mail_;
};

}  // namespace freeio::cpu
