// Pairs the calls of the ranks of one exchange, without blocking any thread.
//
// XLA:CPU runs independent calls of one program concurrently, and devices may be several calls
// apart. So two calls with equal attributes need not belong together. The calls of one exchange are
// the n-th calls of one custom-call instance, in one run of the program, by the ranks of one group.
// In this process a Rendezvous object stands for the instance: XLA makes one for each, and shares
// it among the devices. Between processes an instance has a name (InstanceName).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "cpu/instance_name.h"
#include "cpu/operands.h"
#include "cpu/peer_exchanges.h"
#include "cpu/session.h"

namespace freeio::cpu {

class Rendezvous {
 public:
  // `groups`: mesh device indices, a group of num_ranks after the other, in order of rank.
  // `hosts`: the host of each of them, numbered in each group from 0 in order of rank; empty: all
  // are on one host. `spans_hosts`: the ranks only meet (see Meet), because they are on several
  // hosts.
  Rendezvous(const Layout& layout, std::vector<int64_t> groups, std::vector<int64_t> hosts,
             bool spans_hosts, const InstanceName& name);
  ~Rendezvous();

  // One rank's call. `done` is called exactly once: when the exchange is complete, or with the
  // error that ended it, on this thread before arrive() returns or on a thread of its own.
  void arrive(int64_t run, int64_t device, Operands operands, Done done);

 private:
  // Calls of one group in one run.
  struct CallsOfRun {
    std::vector<int64_t> calls;                        // made so far, by rank
    std::map<int64_t, std::shared_ptr<Session>> open;  // by number of the call
  };

  // Of the ranks of a group; null: they are on one host.
  const int64_t* hosts_of(int64_t group) const;
  std::shared_ptr<Session> open_session(int64_t run, int64_t group, int64_t number);
  void forget(int64_t run, int64_t group, int64_t number);

  const Layout layout_;
  const std::vector<int64_t> groups_;
  const std::vector<int64_t> hosts_;
  const bool spans_hosts_;
  const InstanceName name_;
  std::map<int64_t, int64_t> member_of_device_;             // position in groups_
  std::vector<std::shared_ptr<GroupProcesses>> processes_;  // by group
  std::mutex mutex_;
  std::map<std::pair<int64_t, int64_t>, CallsOfRun> runs_;  // by run and group
};

}  // namespace freeio::cpu
