#include "cpu/peer_session.h"

#include <chrono>
#include <exception>
#include <stdexcept>
#include <thread>
#include <utility>

#include "cpu/notes.h"
#include "cpu/threads.h"

namespace freeio::cpu {

PeerSession::PeerSession(PeerExchanges& exchanges, const CallName& name, bool spans_hosts,
                         const Layout& layout, std::vector<int64_t> devices,
                         std::shared_ptr<GroupProcesses> processes, std::function<void()> forget)
    : exchanges_(exchanges),
      name_(name),
      spans_hosts_(spans_hosts),
      layout_(layout),
      devices_(std::move(devices)),
      processes_(std::move(processes)),
      forget_(std::move(forget)),
      patience_(timeout_in_seconds()),
      to_all_(processes_->of_rank.empty()),
      ranks_(layout.num_ranks) {}

bool PeerSession::lacks(int64_t rank, int process) const {
  return rank >= 0 && rank < layout_.num_ranks && !ranks_[rank].has_called && awaits(process);
}

bool PeerSession::concerns(int process) const {
  return spans_hosts_ || exchanges_.peers_.at(process).is_here;
}

std::set<int> PeerSession::peers_of_group() const {
  std::set<int> peers(processes_->of_rank.begin(), processes_->of_rank.end());
  for (const Rank& rank : ranks_) {
    if (rank.has_called) peers.insert(rank.process);
  }
  peers.erase(exchanges_.process_);
  return peers;
}

std::vector<int> PeerSession::audience() const {
  std::vector<int> processes;
  if (to_all_ && state_ == State::kGathering) {
    for (const auto& [process, peer] : exchanges_.peers_) {
      if (concerns(process)) processes.push_back(process);
    }
  } else {
    const std::set<int> peers = peers_of_group();
    processes.assign(peers.begin(), peers.end());
  }
  return processes;
}

std::function<void()> PeerSession::arrive(int64_t rank, Operands&& operands, Done&& done) {
  AfterUnlock after;
  std::lock_guard lock(exchanges_.mutex_);
  Rank& mine = ranks_[rank];
  mine.has_called = true;
  mine.process = exchanges_.process_;
  if (!failure_.ok()) return [done = std::move(done), status = failure_] { done(status); };
  mine.posted = {layout_, std::move(operands), control_block().give_ups};
  mine.done = std::move(done);
  if (!is_posted_) {
    is_posted_ = true;
    watch(shared_from_this());
    notice_who_is_gone(after);
  }
  try {
    if (failure_.ok()) post(rank);
    if (failure_.ok()) exchanges_.compare_programs(name_.run, after);
    if (failure_.ok() && begin_if_complete()) return [self = shared_from_this()] { self->run(); };
  } catch (const std::exception& error) {
    fail(Code::kInternal, name() + ": " + error.what(), after);
  }
  return nullptr;
}

void PeerSession::post(int64_t rank) {
  Message message;
  message.kind = Message::Kind::kArrived;
  message.name = name_;
  message.rank = rank;
  message.posted = ranks_[rank].posted;
  for (int process : audience()) exchanges_.send(process, message);
}

void PeerSession::notice_who_is_gone(AfterUnlock& after) {
  if (exchanges_.has_left_) {
    fail(Code::kUnavailable,
         name() + ": " + exchanges_.who(exchanges_.process_) +
             " has called freeio_jax.shutdown(), and there are no more exchanges between processes",
         after);
  }
  for (const auto& [process, peer] : exchanges_.peers_) {
    if (peer.departure) peer_gone(process, *peer.departure, after);
  }
}

void PeerSession::arrived(Letter&& letter, AfterUnlock& after) {
  Rank& rank = ranks_[letter.rank];
  rank.has_called = true;
  rank.process = letter.process;
  rank.posted = std::move(letter.posted);
  if (begin_if_complete()) {
    after.add([self = shared_from_this()] { run_on_own_thread([self] { self->run(); }); });
  }
}

bool PeerSession::begin_if_complete() {
  if (state_ != State::kGathering) return false;
  for (const Rank& rank : ranks_) {
    if (!rank.has_called) return false;
  }
  state_ = State::kRunning;
  if (to_all_) {
    processes_->of_rank.clear();
    for (const Rank& rank : ranks_) processes_->of_rank.push_back(rank.process);
    const std::set<int> peers = peers_of_group();
    Message message;
    message.kind = Message::Kind::kRetracted;
    message.name = name_;
    for (const auto& [process, peer] : exchanges_.peers_) {
      if (concerns(process) && peers.count(process) == 0) exchanges_.send(process, message);
    }
  }
  return true;
}

// The calls of all ranks are known, and do not change until end().
void PeerSession::run() {
  Status status;
  try {
    exchange();
  } catch (const ReadError& error) {
    std::lock_guard lock(exchanges_.mutex_);
    status = {Code::kUnavailable,
              name() + ": " +
                  (error.peer_ended() ? exchanges_.who(error.process()) +
                                            ranks_of(error.process()) + " ended while " +
                                            exchanges_.who(exchanges_.process_) + " read its rows"
                                      : error.what())};
  } catch (const std::invalid_argument& error) {
    status = {Code::kInvalidArgument, error.what()};
  } catch (const std::exception& error) {
    status = {Code::kUnavailable, name() + ": " + error.what()};
    await_reason();
  }
  AfterUnlock after;
  std::lock_guard lock(exchanges_.mutex_);
  state_ = State::kPeersReading;
  if (!failure_.ok()) {
    end(failure_, after);  // it failed while this ran
  } else if (!status.ok()) {
    fail(status.code, status.message, after);
  } else {
    Message message;
    message.kind = Message::Kind::kDone;
    message.name = name_;
    for (int process : peers_of_group()) exchanges_.send(process, message);
    end_if_done(after);
  }
}

void PeerSession::exchange() {
  const std::string here = describe(layout_, ranks_[0].posted.operands);
  Homes homes(ranks_.size());
  std::vector<Operands> operands;
  for (size_t r = 0; r < ranks_.size(); ++r) {
    const std::string there = describe(ranks_[r].posted.layout, ranks_[r].posted.operands);
    if (there != here) {
      throw std::invalid_argument(
          "freeio_jax: ranks of one exchange make different calls: rank 0 of " +
          exchanges_.who(ranks_[0].process) + " " + here + ", rank " + std::to_string(r) + " of " +
          exchanges_.who(ranks_[r].process) + " " + there);
    }
    operands.push_back(ranks_[r].posted.operands);
    // A meeting reads no memory. The map of peers never changes.
    if (!spans_hosts_ && ranks_[r].process != exchanges_.process_)
      homes[r] = &exchanges_.peers_.at(ranks_[r].process).memory;
  }
  try {
    run_exchange(layout_, operands, homes);
  } catch (const ReadError& error) {
    // A peer that gave up may have freed its rows. Then the error must name that reason.
    if (!error.peer_ended()) check_that_nobody_gave_up(homes);
    throw;
  }
  check_that_nobody_gave_up(homes);
}

// A peer that gives up sends its reason first, or its reason is an event that this process will
// notice, too. The reason names the process that caused it, and may still be on its way. This wait
// is bounded, because the peer may have failed in another exchange.
void PeerSession::await_reason() {
  for (int milliseconds = 0; milliseconds < 200; ++milliseconds) {
    {
      std::lock_guard lock(exchanges_.mutex_);
      if (!failure_.ok()) return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void PeerSession::check_that_nobody_gave_up(const Homes& homes) const {
  for (size_t r = 0; r < ranks_.size(); ++r) {
    if (homes[r] != nullptr && homes[r]->give_ups() != ranks_[r].posted.give_ups) {
      throw std::runtime_error(exchanges_.who(ranks_[r].process) +
                               " stopped waiting before its rows were read");
    }
  }
}

void PeerSession::end_if_done(AfterUnlock& after) {
  if (state_ != State::kPeersReading) return;
  for (int process : peers_of_group()) {
    if (awaits(process)) return;
  }
  end({}, after);
}

void PeerSession::end(const Status& status, AfterUnlock& after) {
  state_ = State::kOver;
  failure_ = status;
  stop_watching(shared_from_this());
  if (status.ok()) {
    after.add(forget_);
    exchanges_.succeeded(name_.run);
  } else {
    // This comes before XLA gets any buffer back. Partner: check_that_nobody_gave_up() in the
    // peers, which read this after they have read rows.
    control_block().give_ups.fetch_add(1);
  }
  for (Rank& rank : ranks_) {
    if (!rank.done) continue;
    after.add([done = std::move(rank.done), status] {
      run_on_own_thread([done, status] { done(status); });
    });
    rank.done = nullptr;
  }
  exchanges_.remove(name_);
}

void PeerSession::fail(Code code, const std::string& text, AfterUnlock& after) {
  if (!failure_.ok() || state_ == State::kOver) return;
  failure_ = {code, text};
  exchanges_.run_failed(name_.run, failure_, audience());
  // While run() uses the buffers, the session must not end. run() ends it afterwards.
  if (state_ != State::kRunning) end(failure_, after);
}

void PeerSession::peer_done(int process, AfterUnlock& after) {
  silent_.insert(process);
  end_if_done(after);
}

void PeerSession::peer_failed(int process, const std::string& text, AfterUnlock& after) {
  // A peer that was done before cannot make this exchange fail.
  if (silent_.insert(process).second) fail(Code::kUnavailable, text, after);
}

void PeerSession::peer_gone(int process, pod::Departure how, AfterUnlock& after) {
  const bool involved = peers_of_group().count(process) > 0;
  // Before the first exchange of a group is complete, any process may have its ranks.
  const bool unknown = how != pod::Departure::kOrderly && to_all_ && state_ == State::kGathering;
  if (state_ != State::kOver && awaits(process) && concerns(process) && (involved || unknown)) {
    const bool out_of_reach =
        how == pod::Departure::kDeath && !exchanges_.peers_.at(process).is_here;
    std::string did = " ended";
    if (out_of_reach) did = " ended, or cannot be reached any more,";
    if (how == pod::Departure::kOrderly) {
      did = " left (freeio_jax.shutdown(), or the end of its program)";
    }
    if (how == pod::Departure::kGarbage) did = " sent bytes that are no message of this engine";
    fail(Code::kUnavailable,
         name() + ": " + exchanges_.who(process) + ranks_of(process) + did + " while " +
             exchanges_.who(exchanges_.process_) + " waited for it" +
             (out_of_reach ? ". If it still runs, its connection is lost for good: all processes "
                             "must call freeio_jax.shutdown() and then freeio_jax.initialize(). "
                             "Otherwise start the program again."
                           : ""),
         after);
  }
  silent_.insert(process);
}

bool PeerSession::look() {
  AfterUnlock after;
  std::lock_guard lock(exchanges_.mutex_);
  if (state_ == State::kOver || !failure_.ok()) return false;
  if (has_committed()) {
    note(who_waits_for_whom(waits_without_end(patience_)) +
         " This process does not give up, because others may have begun the exchange.");
    patience_.extend_past_end();
    return true;
  }
  if (!patience_.at_end()) {
    // While it runs, it reads rows, and waits for no process.
    if (state_ != State::kRunning) note(who_waits_for_whom(waits_on(patience_)));
    patience_.extend();
    return true;
  }
  fail(Code::kDeadlineExceeded, who_waits_for_whom(has_waited(patience_)) + more_time(), after);
  return false;
}

}  // namespace freeio::cpu
