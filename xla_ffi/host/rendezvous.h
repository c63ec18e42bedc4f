// Pairs the calls of the ranks of one exchange, without blocking any thread.
//
// XLA:CPU runs independent calls of one program concurrently and lets devices be several calls
// apart, so equal attributes do not make two calls partners. Partners are the n-th calls, within
// one run of the program, of one custom-call instance by the ranks of one group. The instance is
// the Rendezvous object itself: XLA makes one per instance and shares it among its devices.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/status.h"
#include "host/exchange.h"

namespace freeio::host {

// Seconds that a rank waits for its peers, for exchanges that begin from now on.
void set_timeout(double seconds);

class Session;

class Rendezvous {
 public:
  using Done = std::function<void(const Status&)>;

  // `groups`: mesh device indices, a group of num_ranks after the other, in order of rank.
  Rendezvous(const Layout& layout, std::vector<int64_t> groups);
  ~Rendezvous();

  // One rank's call. `done` is called exactly once: when the exchange is complete, or with the
  // error that ended it. The last rank to come runs the exchange on its own thread and is done
  // when arrive() returns; the others are told on threads of their own.
  void arrive(int64_t run, int64_t device, Operands operands, Done done);

 private:
  // Calls of one group in one run.
  struct Run {
    std::vector<int64_t> calls;                        // made so far, by rank
    std::map<int64_t, std::shared_ptr<Session>> open;  // by number of the call
  };

  const Layout layout_;
  const std::vector<int64_t> groups_;
  std::map<int64_t, int64_t> member_of_device_;  // position in groups_
  std::mutex mutex_;
  std::map<std::pair<int64_t, int64_t>, Run> runs_;  // by run and group
};

}  // namespace freeio::host
