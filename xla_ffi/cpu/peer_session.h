// An exchange whose ranks are in several processes, or may be. peer_exchanges.h says how they
// exchange rows. The mutex of PeerExchanges guards the state of a session.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/patience.h"
#include "cpu/after_unlock.h"
#include "cpu/call_name.h"
#include "cpu/deadlines.h"
#include "cpu/exchange.h"
#include "cpu/mail.h"
#include "cpu/peer_exchanges.h"
#include "cpu/session.h"
#include "cpu/wire.h"
#include "pod/guest.h"

namespace freeio::cpu {

class PeerSession final : public Session,
                          public Waiting,
                          public std::enable_shared_from_this<PeerSession> {
 public:
  PeerSession(PeerExchanges& exchanges, const CallName& name, bool spans_hosts,
              const Layout& layout, std::vector<int64_t> devices,
              std::shared_ptr<GroupProcesses> processes, std::function<void()> forget);

  std::function<void()> arrive(int64_t rank, Operands&& operands, Done&& done) override;
  bool all_arrived() const override { return false; }  // `forget` is called instead
  Clock::time_point due() const override { return patience_.due(); }
  bool look() override;

  // That mutex must be locked for all below. Actions that need it unlocked go to `after`.

  // Whether the session waits for this rank, and for this process. If so, arrived() adds the call.
  bool lacks(int64_t rank, int process) const;
  void arrived(Letter&& letter, AfterUnlock& after);

  // Whether the session waits for this process. It does not after the process is done, has given
  // the run up, or is gone.
  bool awaits(int process) const { return silent_.count(process) == 0; }
  void peer_done(int process, AfterUnlock& after);
  void peer_failed(int process, const std::string& text, AfterUnlock& after);

  void peer_gone(int process, pod::Departure how, AfterUnlock& after);

  void fail(Code code, const std::string& text, AfterUnlock& after);

  const CallName& call_name() const { return name_; }
  std::string description() const;  // of a call of this process; empty: it has made none

 private:
  struct Rank {
    bool has_called = false;
    int process = -1;
    Posted posted;
    Done done;  // of ranks of this process
  };
  enum class State {
    kGathering,     // some ranks have not called
    kRunning,       // this process fills the results of its ranks
    kPeersReading,  // the results are complete, and peers may still read from its ranks
    kOver,
  };

  // Whether this process has told its peers that it will take part in the collective after this
  // meeting. They may wait for it there, and nothing ends that wait. So it must not give up.
  bool has_committed() const { return spans_hosts_ && state_ == State::kPeersReading; }

  bool concerns(int process) const;      // whether the process may have ranks of the group
  std::set<int> peers_of_group() const;  // processes, as far as known
  std::vector<int> audience() const;     // processes that get the messages about this exchange
  void post(int64_t rank);
  void notice_who_is_gone(AfterUnlock& after);
  bool begin_if_complete();
  void run();
  void exchange();
  void check_that_nobody_gave_up(const Homes& homes) const;
  void await_reason();
  void end(const Status& status, AfterUnlock& after);
  void end_if_done(AfterUnlock& after);

  // For messages to users.
  std::string name() const;
  std::string ranks_of(int process) const;
  std::string who_waits_for_whom(const std::string& how_long) const;

  PeerExchanges& exchanges_;
  const CallName name_;
  const bool spans_hosts_;
  const Layout layout_;
  const std::vector<int64_t> devices_;
  const std::shared_ptr<GroupProcesses> processes_;
  const std::function<void()> forget_;
  Patience patience_;
  const bool to_all_;  // posts calls to all processes: those of the group are not known
  State state_ = State::kGathering;
  bool is_posted_ = false;  // peers know of this exchange
  Status failure_;
  std::vector<Rank> ranks_;
  std::set<int> silent_;  // processes that will send no more messages about this exchange
};

}  // namespace freeio::cpu
