#include "cpu/peer_exchanges.h"

#include <algorithm>
#include <atomic>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "core/channels.h"
#include "cpu/notes.h"
#include "cpu/peer_session.h"

namespace freeio::cpu {
namespace {

std::atomic<PeerExchanges*> current_exchanges{nullptr};

}  // namespace

PeerExchanges::PeerExchanges(pod::Pod& pod, const std::map<int, RemoteControlBlock>& control_blocks)
    : pod_(pod), process_(pod.self().number) {
  for (const pod::Process& process : pod.others()) {
    peers_.emplace(process.number, Peer{PeerMemory(process, control_blocks.at(process.number)),
                                        process.is_here(), std::nullopt});
  }
}

void PeerExchanges::try_to_read() const {
  for (const auto& [process, peer] : peers_) {
    if (!peer.is_here) continue;
    try {
      peer.memory.give_ups();
    } catch (const ReadError& error) {
      throw std::runtime_error(
          std::string("freeio_jax.initialize: ") + error.what() +
          (error.peer_ended() ? " while process " + std::to_string(process_) + " connected with it"
                              : ""));
    }
  }
}

PeerExchanges* PeerExchanges::current() {
  return current_exchanges.load(std::memory_order_acquire);
}

void PeerExchanges::make_current(std::unique_ptr<PeerExchanges> exchanges) {
  current_exchanges.store(exchanges.release(), std::memory_order_release);
}

void PeerExchanges::leaving() {
  AfterUnlock after;
  std::lock_guard lock(mutex_);
  has_left_ = true;
  for (const auto& session : open_sessions()) {
    session->fail(Code::kUnavailable, "freeio_jax: " + who(process_) + " called shutdown()", after);
  }
}

bool PeerExchanges::is_local(const GroupProcesses& group) {
  std::lock_guard lock(mutex_);
  if (group.of_rank.empty()) return peers_.empty();
  return std::all_of(group.of_rank.begin(), group.of_rank.end(),
                     [this](int process) { return process == process_; });
}

std::shared_ptr<Session> PeerExchanges::open(const InstanceName& instance, bool spans_hosts,
                                             int64_t group, int64_t run, const Layout& layout,
                                             std::vector<int64_t> devices,
                                             std::shared_ptr<GroupProcesses> processes,
                                             std::function<void()> forget) {
  AfterUnlock after;
  std::lock_guard lock(mutex_);
  CallName name;
  name.run = {instance.program, group, 0};
  GroupRuns& runs = runs_of(name.run);
  name.run.number = runs.number_of(run);
  Run& known = runs.at(name.run.number);
  known.has_begun_here = true;
  name.attributes = instance.attributes;
  name.ordinal = instance.ordinal;
  name.call = known.calls[{name.attributes, name.ordinal}]++;
  auto session = std::make_shared<PeerSession>(*this, name, spans_hosts, layout, std::move(devices),
                                               std::move(processes), std::move(forget));
  sessions_[name] = session;
  if (!known.failure.ok()) {
    session->fail(known.failure.code, known.failure.message, after);
    return session;
  }
  for (Letter& letter : mail_.take(name)) {
    if (session->lacks(letter.rank, letter.process)) session->arrived(std::move(letter), after);
  }
  return session;
}

void PeerExchanges::add_groups(const InstanceName& name, int64_t num_ranks,
                               const std::vector<int64_t>& groups) {
  std::lock_guard lock(mutex_);
  groups_[name.module].try_emplace(name.program, ProgramGroups{num_ranks, groups});
}

void PeerExchanges::device_failed(uint64_t module, int64_t run, int64_t device, const Status& why) {
  AfterUnlock after;
  std::lock_guard lock(mutex_);
  std::vector<int> everybody;
  for (const auto& [process, peer] : peers_) everybody.push_back(process);
  for (const auto& [program, groups] : groups_[module]) {
    const auto member = std::find(groups.devices.begin(), groups.devices.end(), device);
    if (member == groups.devices.end()) continue;
    RunName name{program, (member - groups.devices.begin()) / groups.num_ranks, 0};
    GroupRuns& runs = runs_of(name);
    name.number = runs.number_of(run);
    if (runs.is_over(name.number)) continue;
    runs.at(name.number).has_begun_here = true;
    run_failed(name, why, everybody);
    for (const auto& session : open_sessions()) {
      if (session->call_name().run == name) session->fail(why.code, why.message, after);
    }
  }
}

void PeerExchanges::received(int process, std::string_view text, pod::UniqueFd) {
  Message message = decode(text);
  AfterUnlock after;
  std::lock_guard lock(mutex_);
  deliver(process, std::move(message), after);
}

void PeerExchanges::gone(int process, pod::Departure how) {
  AfterUnlock after;
  std::lock_guard lock(mutex_);
  Peer& peer = peers_.at(process);
  peer.departure = how;
  if (!peer.is_here && how == pod::Departure::kDeath) {
    // XLA's collectives fail, too, and do not say whose end made them fail.
    note("P" + who(process).substr(1) + " ended, or cannot be reached any more");
  }
  for (const auto& session : open_sessions()) session->peer_gone(process, how, after);
}

void PeerExchanges::deliver(int process, Message&& message, AfterUnlock& after) {
  const std::shared_ptr<PeerSession> session = find(message.name);
  const RunName run = message.name.run;
  switch (message.kind) {
    case Message::Kind::kArrived: {
      Letter letter{process, message.rank, std::move(message.posted)};
      if (session != nullptr) {
        if (session->lacks(letter.rank, process)) session->arrived(std::move(letter), after);
        return;
      }
      GroupRuns& runs = runs_of(run);
      if (runs.is_over(run.number) || !runs.at(run.number).failure.ok()) return;
      mail_.keep(message.name, std::move(letter));
      compare_programs(run, after);
      return;
    }
    case Message::Kind::kDone:
      if (session != nullptr && session->awaits(process)) session->peer_done(process, after);
      return;
    case Message::Kind::kFailed:
      run_failed_at(process, run, message.text, after);
      return;
    case Message::Kind::kRetracted:
      // All processes of the group may send this. The group has no runs here.
      if (mail_.retract(message.name, process)) runs_of(run).forget_unless_ours(run.number);
      return;
  }
}

void PeerExchanges::send(int process, const Message& message) {
  pod_.send(process, Channel::kCpu, encode(message));
}

std::shared_ptr<PeerSession> PeerExchanges::find(const CallName& name) const {
  const auto found = sessions_.find(name);
  return found != sessions_.end() ? found->second : nullptr;
}

std::vector<std::shared_ptr<PeerSession>> PeerExchanges::open_sessions() const {
  std::vector<std::shared_ptr<PeerSession>> open;
  for (const auto& [name, session] : sessions_) open.push_back(session);
  return open;
}

void PeerExchanges::remove(const CallName& name) { sessions_.erase(name); }

// XLA ends a device's program with the first call that fails. So the peers must not wait for this
// process in that run. They get one message about it.
void PeerExchanges::run_failed(const RunName& name, const Status& why,
                               const std::vector<int>& audience) {
  Run& run = runs_of(name).at(name.number);
  if (!run.failure.ok()) return;
  run.failure = why;
  Message message;
  message.kind = Message::Kind::kFailed;
  message.name.run = name;
  message.text = why.message;
  for (const int process : audience) send(process, message);
  mail_.drop(name, {name.program, name.group, name.number + 1});
}

void PeerExchanges::run_failed_at(int process, const RunName& name, const std::string& text,
                                  AfterUnlock& after) {
  GroupRuns& runs = runs_of(name);
  if (runs.is_over(name.number)) return;
  const Status why = {Code::kUnavailable, text + " [reported by " + who(process) + "]"};
  // This is set before the sessions fail, so that they do not send the failure again: the process
  // that reported it has sent it to all.
  Run& run = runs.at(name.number);
  if (run.failure.ok()) run.failure = why;
  mail_.drop(name, {name.program, name.group, name.number + 1});
  for (const auto& session : open_sessions()) {
    if (session->call_name().run == name) session->peer_failed(process, why.message, after);
  }
}

void PeerExchanges::succeeded(const RunName& name) {
  const auto [first, end] = runs_of(name).complete(name.number);
  mail_.drop({name.program, name.group, first}, {name.program, name.group, end});
}

// A peer runs another program if it makes a call in this run that the program here does not have.
// (XLA makes all instances of a program before it runs the program.)
void PeerExchanges::compare_programs(const RunName& run, AfterUnlock& after) {
  const Run* const known = runs_of(run).find(run.number);
  if (known == nullptr || !known->has_begun_here) return;
  mail_.find_in_run(run, [&](const CallName& name, const Mail::Letters& letters) {
    if (has_instance(name.attributes)) return false;
    const Letter& letter = letters.front();
    for (const auto& session : open_sessions()) {
      const std::string here = session->description();
      if (!(session->call_name().run == run) || here.empty() ||
          !session->lacks(letter.rank, letter.process)) {
        continue;
      }
      session->fail(Code::kInvalidArgument,
                    "freeio_jax: ranks of one exchange make different calls: " + who(process_) +
                        " " + here + ", " + who(letter.process) + " " +
                        describe(letter.posted.layout, letter.posted.operands) +
                        ". All ranks of the expert axis must run the same program.",
                    after);
      return true;  // the failure has dropped the mail of that run
    }
    return false;
  });
}

std::string PeerExchanges::elsewhere_note() const {
  std::ostringstream text;
  for (const auto& [process, peer] : peers_) {
    if (!peer.is_here) text << " " << process;
  }
  if (text.str().empty()) return "";
  return " Processes" + text.str() +
         " are on other hosts, and this program was compiled for ranks on one host. Compile it in "
         "this pod, after freeio_jax.initialize().";
}

std::string PeerExchanges::waiting_in(int process, const std::string& here) const {
  const auto peer = peers_.find(process);
  if (peer == peers_.end()) return "";
  std::string text = "P" + who(process).substr(1);
  if (const auto departure = peer->second.departure) {
    switch (*departure) {
      case pod::Departure::kDeath:
        return text + (peer->second.is_here ? " has ended."
                                            : " has ended, or cannot be reached any more.");
      case pod::Departure::kOrderly:
        return text + " has left the program.";
      case pod::Departure::kGarbage:
        return text + " has sent what is no message.";
    }
  }
  const Letter* const letter = mail_.find_of(process);
  if (letter == nullptr) return text + " waits in no exchange.";
  const std::string there = describe(letter->posted.layout, letter->posted.operands);
  text += " waits in " + there;
  if (there == here) text += " of another program, or another one of these in this program";
  return text + ".";
}

}  // namespace freeio::cpu
