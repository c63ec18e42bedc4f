#include "cpu/pod.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "cpu/instance_name.h"
#include "cpu/pod_session.h"

namespace freeio::cpu {
namespace {

std::atomic<Pod*> current_pod{nullptr};

bool same(const RunName& a, const RunName& b) { return !(a < b) && !(b < a); }

void run_all(std::vector<std::function<void()>>& after) {
  for (auto& action : after) action();
}

}  // namespace

Pod* Pod::current() { return current_pod.load(std::memory_order_acquire); }

void Pod::join(int process, const std::vector<Member>& members, std::vector<int> elsewhere,
               bool read_memory) {
  std::map<int, Peer> peers;
  std::map<int, pod::UniqueFd> sockets;
  for (const Member& member : members)
    sockets.emplace(member.process, pod::UniqueFd(member.socket));
  for (const Member& member : members) {
    if (member.pid == 0) {  // what the kernel says of who has no number here
      throw std::runtime_error(
          "freeio_jax.initialize: process " + std::to_string(member.process) +
          " of this host is in another PID namespace than process " + std::to_string(process) +
          ", so that neither its memory can be read nor its end be seen. Run both in one "
          "container, or let containers share the "
          "namespace (docker: --pid=host; Kubernetes: shareProcessNamespace: true)");
    }
    const PeerMemory memory(member.process, member.pid, member.control_address, member.nonce);
    try {
      if (read_memory) memory.give_ups();
    } catch (const ReadError& error) {
      throw std::runtime_error(
          std::string("freeio_jax.initialize: ") + error.what() +
          (error.peer_ended() ? " while process " + std::to_string(process) + " connected with it"
                              : ""));
    }
    peers.emplace(member.process, memory);
  }
  // Never freed: XLA may call the engine until the process ends.
  std::unique_ptr<Pod> pod(new Pod(process, std::move(peers), std::move(elsewhere)));
  Pod* const shared = pod.get();
  pod->links_ = std::make_unique<pod::Links>(
      std::move(sockets),
      [shared](int from, std::string_view bytes, pod::UniqueFd file) {
        shared->received(from, bytes, std::move(file));
      },
      [shared](int from) { shared->lost(from, Peer::State::kDied); });
  current_pod.store(pod.release(), std::memory_order_release);
}

Pod::Pod(int process, std::map<int, Peer> peers, std::vector<int> elsewhere)
    : process_(process), elsewhere_(std::move(elsewhere)), peers_(std::move(peers)) {}

void Pod::leave() {
  if (getpid() != pid_) return;
  After after;
  {
    std::lock_guard lock(mutex_);
    if (left_) return;
    left_ = true;
    for (const auto& [process, peer] : peers_) send(process, Message{});
    for (const auto& session : open_sessions()) {
      session->fail(Code::kUnavailable, "freeio_jax: " + who(process_) + " called shutdown()",
                    after);
    }
  }
  run_all(after);
  links_->stop();
}

bool Pod::is_local(const GroupProcesses& group) {
  std::lock_guard lock(mutex_);
  if (group.of_rank.empty()) return peers_.empty() && elsewhere_.empty();
  for (int process : group.of_rank) {
    if (process != process_) return false;
  }
  return true;
}

std::shared_ptr<Session> Pod::open(const InstanceName& instance, int64_t group, int64_t run,
                                   const Layout& layout, std::vector<int64_t> devices,
                                   std::shared_ptr<GroupProcesses> processes,
                                   std::function<void()> forget) {
  After after;
  std::shared_ptr<PodSession> session;
  {
    std::lock_guard lock(mutex_);
    CallName name;
    name.run = {instance.program, group, 0};
    Runs& runs = runs_of(name.run);
    name.run.number = runs.number_of(run);
    Run& known = runs.runs[name.run.number];
    known.here = true;
    name.attributes = instance.attributes;
    name.ordinal = instance.ordinal;
    name.call = known.calls[{name.attributes, name.ordinal}]++;
    session = std::make_shared<PodSession>(*this, name, layout, std::move(devices),
                                           std::move(processes), std::move(forget));
    sessions_[name] = session;
    if (!known.failure.ok()) {
      session->fail(known.failure.code, known.failure.message, after);
    } else {
      const auto found = mail_.find(name);
      if (found != mail_.end()) {
        std::deque<Mail> mail = std::move(found->second);
        mail_.erase(found);
        for (Mail& item : mail) deliver(item.process, std::move(item.message), after);
      }
    }
  }
  run_all(after);
  return session;
}

void Pod::add_groups(const InstanceName& name, int64_t num_ranks,
                     const std::vector<int64_t>& groups) {
  std::lock_guard lock(mutex_);
  groups_[name.module].try_emplace(name.program, Groups{num_ranks, groups});
}

void Pod::device_failed(uint64_t module, int64_t run, int64_t device, const Status& why) {
  After after;
  {
    std::lock_guard lock(mutex_);
    std::vector<int> everybody;
    for (const auto& [process, peer] : peers_) everybody.push_back(process);
    for (const auto& [program, groups] : groups_[module]) {
      const auto member = std::find(groups.devices.begin(), groups.devices.end(), device);
      if (member == groups.devices.end()) continue;
      RunName name{program, (member - groups.devices.begin()) / groups.num_ranks, 0};
      Runs& runs = runs_of(name);
      name.number = runs.number_of(run);
      if (name.number < runs.oldest) continue;
      runs.runs[name.number].here = true;
      run_failed(name, why, everybody);
      for (const auto& session : open_sessions()) {
        if (same(session->call_name().run, name)) session->fail(why.code, why.message, after);
      }
    }
  }
  run_all(after);
}

void Pod::admit(Guest& guest) {
  std::unique_lock lock(mutex_);
  // What comes meanwhile must not overtake what has come before.
  while (!guest_mail_.empty()) {
    const auto mail = std::exchange(guest_mail_, {});
    lock.unlock();
    for (const auto& item : mail) item(guest);
    lock.lock();
  }
  guest_ = &guest;
}

void Pod::tell(int process, std::string text, int file) {
  Message message;
  message.kind = Message::Kind::kOther;
  message.text = std::move(text);
  links_->send(process, encode(message), file);
}

void Pod::to_guest(int process, std::string&& text, pod::UniqueFd&& file, After& after) {
  auto deliver_it = [process, text = std::move(text),
                     file = std::make_shared<pod::UniqueFd>(std::move(file))](Guest& guest) {
    guest.received(process, text, std::move(*file));
  };
  if (guest_ == nullptr) {
    guest_mail_.push_back(std::move(deliver_it));
  } else {
    after.push_back([this, deliver_it = std::move(deliver_it)] { deliver_it(*guest_); });
  }
}

void Pod::tell_guest_gone(int process, bool died, After& after) {
  if (guest_ == nullptr) {
    guest_mail_.push_back([process, died](Guest& guest) { guest.gone(process, died); });
  } else {
    after.push_back([this, process, died] { guest_->gone(process, died); });
  }
}

void Pod::received(int process, std::string_view bytes, pod::UniqueFd file) {
  After after;
  try {
    Message message = decode(bytes);
    std::lock_guard lock(mutex_);
    if (message.kind == Message::Kind::kOther) {
      to_guest(process, std::move(message.text), std::move(file), after);
    } else {
      deliver(process, std::move(message), after);
    }
  } catch (const std::runtime_error&) {
    lost(process, Peer::State::kForeign);
  }
  run_all(after);
}

void Pod::lost(int process, Peer::State how) {
  After after;
  {
    std::lock_guard lock(mutex_);
    Peer& peer = peers_.at(process);
    if (peer.state != Peer::State::kHere) return;
    peer.state = how;
    for (const auto& session : open_sessions()) session->peer_lost(process, how, after);
    tell_guest_gone(process, true, after);
  }
  run_all(after);
}

void Pod::deliver(int process, Message&& message, After& after) {
  const std::shared_ptr<PodSession> session = find(message.name);
  const RunName run = message.name.run;
  switch (message.kind) {
    case Message::Kind::kArrived:
      if (session != nullptr) {
        if (session->lacks(message.rank, process)) {
          session->arrived(process, std::move(message), after);
        }
        return;
      }
      if (Runs& runs = runs_of(run);
          run.number >= runs.oldest && runs.runs[run.number].failure.ok()) {
        mail_[message.name].push_back({process, std::move(message)});
        compare_programs(run, after);
      }
      return;
    case Message::Kind::kDone:
      if (session != nullptr && session->awaits(process)) session->peer_done(process, after);
      return;
    case Message::Kind::kFailed:
      run_failed_at(process, run, message.text, after);
      return;
    case Message::Kind::kRetracted: {
      const auto found = mail_.find(message.name);
      if (found == mail_.end()) return;
      std::deque<Mail> kept;
      for (Mail& item : found->second) {
        if (item.process != process) kept.push_back(std::move(item));
      }
      found->second = std::move(kept);
      if (found->second.empty()) mail_.erase(found);
      // Others of the group say the same. It has no runs here.
      if (Runs& runs = runs_of(run); runs.next == 0) runs.runs.erase(run.number);
      return;
    }
    case Message::Kind::kLeaving: {
      const Peer::State how = peers_.at(process).state = Peer::State::kLeft;
      for (const auto& waiting : open_sessions()) waiting->peer_lost(process, how, after);
      tell_guest_gone(process, false, after);
      return;
    }
    case Message::Kind::kOther:
      return;  // received() has it
  }
}

void Pod::send(int process, const Message& message) { links_->send(process, encode(message)); }

std::shared_ptr<PodSession> Pod::find(const CallName& name) const {
  const auto found = sessions_.find(name);
  return found != sessions_.end() ? found->second : nullptr;
}

std::vector<std::shared_ptr<PodSession>> Pod::open_sessions() const {
  std::vector<std::shared_ptr<PodSession>> open;
  for (const auto& [name, session] : sessions_) open.push_back(session);
  return open;
}

void Pod::remove(const CallName& name) { sessions_.erase(name); }

// The peers must not wait for this process in that run: XLA ends a device's program with the first
// call of it that fails. They hear of it once.
void Pod::run_failed(const RunName& name, const Status& why, const std::vector<int>& audience) {
  Run& run = runs_of(name).runs[name.number];
  if (!run.failure.ok()) return;
  run.failure = why;
  Message message;
  message.kind = Message::Kind::kFailed;
  message.name.run = name;
  message.text = why.message;
  for (const int process : audience) send(process, message);
  drop_mail(name, {name.program, name.group, name.number + 1});
}

void Pod::run_failed_at(int process, const RunName& name, const std::string& text, After& after) {
  Runs& runs = runs_of(name);
  if (name.number < runs.oldest) return;
  const Status why = {Code::kUnavailable, text + " [reported by " + who(process) + "]"};
  // Before the sessions: what one process has told all need not be told again.
  Run& run = runs.runs[name.number];
  if (run.failure.ok()) run.failure = why;
  drop_mail(name, {name.program, name.group, name.number + 1});
  for (const auto& session : open_sessions()) {
    if (same(session->call_name().run, name)) session->peer_failed(process, why.message, after);
  }
}

// XLA has at most 32 runs of a device in flight. Earlier ones are over where all ranks have come to
// this one, and nobody speaks of them any more.
void Pod::succeeded(const RunName& name) {
  constexpr int64_t kInFlight = 32;
  Runs& runs = runs_of(name);
  if (name.number - kInFlight <= runs.oldest) return;
  drop_mail({name.program, name.group, runs.oldest},
            {name.program, name.group, name.number - kInFlight});
  runs.oldest = name.number - kInFlight;
  runs.runs.erase(runs.runs.begin(), runs.runs.lower_bound(runs.oldest));
  for (auto item = runs.numbers.begin(); item != runs.numbers.end();) {
    item = item->second < runs.oldest ? runs.numbers.erase(item) : std::next(item);
  }
}

void Pod::drop_mail(const RunName& first, const RunName& end) {
  CallName from, to;
  // Below all calls of the run.
  from.ordinal = to.ordinal = std::numeric_limits<int64_t>::min();
  from.run = first;
  to.run = end;
  mail_.erase(mail_.lower_bound(from), mail_.lower_bound(to));
}

// A peer that makes a call of this run of which the program here has no like runs another program.
// XLA makes all instances of a program before it runs.
void Pod::compare_programs(const RunName& name, After& after) {
  const auto found = runs_of(name).runs.find(name.number);
  if (found == runs_of(name).runs.end() || !found->second.here) return;
  CallName first;
  first.run = name;
  first.ordinal = std::numeric_limits<int64_t>::min();
  for (auto item = mail_.lower_bound(first); item != mail_.end() && !(name < item->first.run);
       ++item) {
    if (has_instance(item->first.attributes)) continue;
    const Mail& mail = item->second.front();
    for (const auto& session : open_sessions()) {
      const std::string here = session->description();
      if (!same(session->call_name().run, name) || here.empty() ||
          !session->lacks(mail.message.rank, mail.process)) {
        continue;
      }
      session->fail(Code::kInvalidArgument,
                    "freeio_jax: ranks of one exchange make different calls: " + who(process_) +
                        " " + here + ", " + who(mail.process) + " " +
                        describe(mail.message.posted.layout, mail.message.posted.operands) +
                        ". All ranks of the expert axis must run the same program.",
                    after);
      return;  // the mail of that run is gone
    }
  }
}

std::string Pod::who(int process) const {
  const auto peer = peers_.find(process);
  return (peer != peers_.end() ? peer->second.memory : PeerMemory(process, pid_, 0, 0)).who();
}

std::string Pod::elsewhere_note() const {
  if (elsewhere_.empty()) return "";
  std::ostringstream text;
  text << " Processes";
  for (int process : elsewhere_) text << " " << process;
  text << " are on other hosts, with which this engine does not exchange rows.";
  return text.str();
}

std::string Pod::waiting_in(int process, const std::string& here) const {
  const auto peer = peers_.find(process);
  if (peer == peers_.end()) return "";
  std::string text = "P" + who(process).substr(1);
  if (peer->second.state == Peer::State::kDied) return text + " has ended.";
  if (peer->second.state == Peer::State::kLeft) return text + " has left the program.";
  if (peer->second.state == Peer::State::kForeign) return text + " has sent what is no message.";
  for (const auto& [name, mail] : mail_) {
    for (const Mail& item : mail) {
      if (item.process != process || item.message.kind != Message::Kind::kArrived) continue;
      const std::string there = describe(item.message.posted.layout, item.message.posted.operands);
      text += " waits in " + there;
      if (there == here) text += " of another program, or another one of these in this program";
      return text + ".";
    }
  }
  return text + " waits in no exchange.";
}

}  // namespace freeio::cpu
