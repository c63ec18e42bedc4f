// The processes of this host that take part in one program, and the exchanges among their ranks.
//
// Each process posts its ranks' calls (the addresses of their operands) to the others. When the
// calls of all ranks of a group are known, each process fills the results of its own ranks, reading
// rows straight from the others' tensors, and says so. It gives its buffers back to XLA only when
// all others have said so, or after announcing that it does not wait any longer: a peer that reads
// on looks for that announcement before it believes what it has read.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "cpu/peer_memory.h"
#include "cpu/session.h"
#include "cpu/wire.h"
#include "pod/links.h"

namespace freeio::cpu {

// Which process has each rank of a group of one instance. Nothing tells before the first exchange:
// its calls are posted to all processes, and from then on to those of the group alone.
struct GroupProcesses {
  std::vector<int> of_rank;  // empty: not known yet. Guarded by the pod.
};

class PodSession;

class Pod {
 public:
  struct Member {
    int process;
    int pid;
    uint64_t control_address;
    uint64_t nonce;
    int socket;  // connected; the pod's from now on
  };

  // Connects this process with the others of its host, `members`. `elsewhere`: processes of the
  // program on other hosts. Throws std::runtime_error where the memory of one cannot be read;
  // unless `read_memory`, that is not tried before an exchange needs it.
  static void join(int process, const std::vector<Member>& members, std::vector<int> elsewhere,
                   bool read_memory);

  // Another engine of this process that talks with its like in the others. It is called on the
  // thread that serves the links, never with the pod locked.
  class Guest {
   public:
    virtual ~Guest() = default;
    virtual void received(int process, std::string_view text, pod::UniqueFd file) = 0;
    // The process has left or died. Called once for each.
    virtual void gone(int process, bool died) = 0;
  };

  // From now on `guest` gets what comes for it, and what has come before. It must stay until the
  // process ends.
  void admit(Guest& guest);

  // To the guest of another process. Throws as pod::Links::send.
  void tell(int process, std::string text, int file = -1);

  // Null before join(). Lives until the process ends.
  static Pod* current();

  // Tells the peers that this process leaves. Exchanges with them are errors from now on. In a
  // child that was forked from this process it does nothing: the child is in no pod.
  void leave();

  bool is_local(const GroupProcesses& group);

  std::string who(int process) const;  // "process 1 (pid 77)"

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
  // program. Called before XLA knows: the peers of the device's other groups must not wait for it
  // in that run, and take its next one for it.
  void device_failed(uint64_t module, int64_t run, int64_t device, const Status& why);

 private:
  friend class PodSession;

  struct Peer {
    explicit Peer(const PeerMemory& of) : memory(of) {}
    const PeerMemory memory;
    enum class State {
      kHere,
      kLeft,
      kDied,
      kForeign,  // has sent what is no message: what speaks there is not this engine
    } state = State::kHere;
  };
  struct Mail {
    int process;
    Message message;
  };
  // What is known of one run of a program.
  struct Run {
    bool here = false;                                      // this process has come to it
    std::map<std::pair<uint64_t, int64_t>, int64_t> calls;  // made here, by attributes and ordinal
    // Why this process or a peer has given it up: there will be no more exchanges in it.
    Status failure;
  };
  // A program's runs, as one group sees them.
  struct Runs {
    std::map<int64_t, int64_t> numbers;  // by XLA's id
    std::map<int64_t, Run> runs;         // by number
    int64_t next = 0;
    int64_t oldest = 0;  // all earlier ones are over, in all processes

    // The number of what XLA calls `run`: a new one where this process first comes to it.
    int64_t number_of(int64_t run) {
      const auto [number, is_new] = numbers.try_emplace(run, next);
      if (is_new) ++next;
      return number->second;
    }
  };
  struct Groups {
    int64_t num_ranks;
    std::vector<int64_t> devices;
  };
  // Things to do once the pod is unlocked.
  using After = std::vector<std::function<void()>>;

  Pod(int process, std::map<int, Peer> peers, std::vector<int> elsewhere);

  void received(int process, std::string_view bytes, pod::UniqueFd file);
  void lost(int process, Peer::State how);
  void to_guest(int process, std::string&& text, pod::UniqueFd&& file, After& after);
  void tell_guest_gone(int process, bool died, After& after);
  // All below: with the pod locked.
  void deliver(int process, Message&& message, After& after);
  void send(int process, const Message& message);
  std::shared_ptr<PodSession> find(const CallName& name) const;
  std::vector<std::shared_ptr<PodSession>> open_sessions() const;
  void remove(const CallName& name);
  Runs& runs_of(const RunName& name) { return runs_[{name.program, name.group}]; }
  // This process gives up what it has not done of the run.
  void run_failed(const RunName& name, const Status& why, const std::vector<int>& audience);
  void run_failed_at(int process, const RunName& name, const std::string& text, After& after);
  // An exchange of the run is complete in all its processes.
  void succeeded(const RunName& name);
  void drop_mail(const RunName& first, const RunName& end);
  void compare_programs(const RunName& name, After& after);
  std::string elsewhere_note() const;  // what to say where a rank may be on another host
  std::string waiting_in(int process, const std::string& here) const;

  const int process_;
  const int pid_ = getpid();
  const std::vector<int> elsewhere_;
  std::mutex mutex_;
  bool left_ = false;
  std::map<int, Peer> peers_;
  std::map<uint64_t, std::map<uint64_t, Groups>> groups_;     // by module and program
  std::map<std::pair<uint64_t, int64_t>, Runs> runs_;         // by program and group
  std::map<CallName, std::shared_ptr<PodSession>> sessions_;  // that have not ended
  std::map<CallName, std::deque<Mail>> mail_;  // for exchanges that nobody here has begun
  Guest* guest_ = nullptr;
  std::vector<std::function<void(Guest&)>> guest_mail_;  // from before it came
  std::unique_ptr<pod::Links> links_;
};

}  // namespace freeio::cpu
