// Pairs the calls of the ranks of one exchange, without blocking any thread.
//
// XLA:CPU runs independent calls of one program concurrently and lets devices be several calls
// apart, so equal attributes do not make two calls partners. Partners are the n-th calls, within
// one run of the program, of one custom-call instance by the ranks of one group. In this process
// the instance is the Rendezvous object itself: XLA makes one per instance and shares it among its
// devices. Between processes it has a name (InstanceName).
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
  Rendezvous(const Layout& layout, std::vector<int64_t> groups, const InstanceName& name);
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

  std::shared_ptr<Session> open_session(int64_t run, int64_t group, int64_t number);
  void forget(int64_t run, int64_t group, int64_t number);

  const Layout layout_;
  const std::vector<int64_t> groups_;
  const InstanceName name_;
  std::map<int64_t, int64_t> member_of_device_;             // position in groups_
  std::vector<std::shared_ptr<GroupProcesses>> processes_;  // by group
  std::mutex mutex_;
  std::map<std::pair<int64_t, int64_t>, CallsOfRun> runs_;  // by run and group
};

}  // namespace freeio::cpu
