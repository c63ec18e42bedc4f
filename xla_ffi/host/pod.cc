#include "host/pod.h"

#include <atomic>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "host/pod_session.h"

namespace freeio::host {
namespace {

std::atomic<Pod*> current_pod{nullptr};

void run_all(std::vector<std::function<void()>>& after) {
  for (auto& action : after) action();
}

}  // namespace

Pod* Pod::current() { return current_pod.load(std::memory_order_acquire); }

void Pod::join(int process, const std::vector<Member>& members, std::vector<int> elsewhere,
               bool read_memory) {
  std::map<int, Peer> peers;
  std::map<int, UniqueFd> sockets;
  for (const Member& member : members) sockets.emplace(member.process, UniqueFd(member.socket));
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
  pod->links_ = std::make_unique<Links>(
      std::move(sockets),
      [shared](int from, std::string_view bytes, UniqueFd file) {
        shared->received(from, bytes, std::move(file));
      },
      [shared](int from) { shared->lost(from, Peer::State::kDied); });
  current_pod.store(pod.release(), std::memory_order_release);
}

Pod::Pod(int process, std::map<int, Peer> peers, std::vector<int> elsewhere)
    : process_(process), elsewhere_(std::move(elsewhere)), peers_(std::move(peers)) {}

void Pod::leave() {
  After after;
  {
    std::lock_guard lock(mutex_);
    if (left_) return;
    left_ = true;
    for (const auto& [process, peer] : peers_) send(process, Message{});
    std::vector<std::shared_ptr<PodSession>> open;
    for (const auto& [name, sessions] : sessions_) {
      open.insert(open.end(), sessions.begin(), sessions.end());
    }
    for (const auto& session : open) {
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

std::shared_ptr<Session> Pod::open(const CallName& name, const Layout& layout,
                                   std::vector<int64_t> devices,
                                   std::shared_ptr<GroupProcesses> processes,
                                   std::function<void()> forget) {
  After after;
  std::shared_ptr<PodSession> session;
  {
    std::lock_guard lock(mutex_);
    session = std::make_shared<PodSession>(*this, name, layout, std::move(devices),
                                           std::move(processes), std::move(forget));
    sessions_[name].push_back(session);
    const auto found = mail_.find(name);
    if (found != mail_.end()) {
      std::deque<Mail> mail = std::move(found->second);
      mail_.erase(found);
      // What this session does not take is for a later one of that name, and goes back.
      for (Mail& item : mail) deliver(item.process, std::move(item.message), after);
    }
  }
  run_all(after);
  return session;
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

void Pod::to_guest(int process, std::string&& text, UniqueFd&& file, After& after) {
  auto deliver_it = [process, text = std::move(text),
                     file = std::make_shared<UniqueFd>(std::move(file))](Guest& guest) {
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

void Pod::received(int process, std::string_view bytes, UniqueFd file) {
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
    std::vector<std::shared_ptr<PodSession>> open;
    for (const auto& [name, sessions] : sessions_) {
      open.insert(open.end(), sessions.begin(), sessions.end());
    }
    for (const auto& session : open) session->peer_lost(process, how, after);
    tell_guest_gone(process, true, after);
  }
  run_all(after);
}

void Pod::deliver(int process, Message&& message, After& after) {
  PodSession* session = nullptr;
  switch (message.kind) {
    case Message::Kind::kArrived:
      session = find(message.name, [&](PodSession& s) { return s.lacks(message.rank, process); });
      if (session != nullptr) {
        session->arrived(process, std::move(message), after);
      } else {
        mail_[message.name].push_back({process, std::move(message)});
      }
      return;
    case Message::Kind::kDone:
      session = find(message.name, [&](PodSession& s) { return s.awaits(process); });
      if (session != nullptr) session->peer_done(process, after);
      return;
    case Message::Kind::kFailed:
      session = find(message.name, [&](PodSession& s) { return s.awaits(process); });
      if (session != nullptr) {
        session->peer_failed(process, message.text, after);
      } else {
        mail_[message.name].push_back({process, std::move(message)});
      }
      return;
    case Message::Kind::kRetracted: {
      const auto found = mail_.find(message.name);
      if (found == mail_.end()) return;
      std::deque<Mail> kept;
      std::vector<int64_t> ranks;
      for (Mail& item : found->second) {
        bool oldest = item.process == process;
        for (int64_t rank : ranks) oldest = oldest && rank != item.message.rank;
        if (oldest) {
          ranks.push_back(item.message.rank);
        } else {
          kept.push_back(std::move(item));
        }
      }
      found->second = std::move(kept);
      if (found->second.empty()) mail_.erase(found);
      return;
    }
    case Message::Kind::kLeaving: {
      const Peer::State how = peers_.at(process).state = Peer::State::kLeft;
      std::vector<std::shared_ptr<PodSession>> open;
      for (const auto& [name, sessions] : sessions_) {
        open.insert(open.end(), sessions.begin(), sessions.end());
      }
      for (const auto& waiting : open) waiting->peer_lost(process, how, after);
      tell_guest_gone(process, false, after);
      return;
    }
    case Message::Kind::kOther:
      return;  // received() has it
  }
}

void Pod::send(int process, const Message& message) { links_->send(process, encode(message)); }

PodSession* Pod::find(const CallName& name, const std::function<bool(PodSession&)>& matches) {
  const auto found = sessions_.find(name);
  if (found == sessions_.end()) return nullptr;
  for (const auto& session : found->second) {
    if (matches(*session)) return session.get();
  }
  return nullptr;
}

void Pod::remove_if_over(PodSession& session) {
  if (!session.over()) return;
  const auto found = sessions_.find(session.call_name());
  if (found == sessions_.end()) return;
  found->second.remove_if([&](const auto& other) { return other.get() == &session; });
  if (found->second.empty()) sessions_.erase(found);
}

std::string Pod::who(int process) const {
  const auto peer = peers_.find(process);
  return (peer != peers_.end() ? peer->second.memory : PeerMemory(process, getpid(), 0, 0)).who();
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

}  // namespace freeio::host
