#include "pod/pod.h"

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace freeio::pod {
namespace {

std::atomic<Pod*> current_pod{nullptr};

// A message on a link is the number of a channel, followed by the text for its guest. The number
// travels as it lies in memory, because both ends are the same program on the same kind of machine.
//
// This number is no channel. It says that the sender leaves and will then close its end.
constexpr uint32_t kLeaving = UINT32_MAX;

std::string frame_of(uint32_t number, std::string_view text) {
  std::string frame(sizeof(number) + text.size(), '\0');
  std::memcpy(frame.data(), &number, sizeof(number));
  text.copy(frame.data() + sizeof(number), text.size());
  return frame;
}

std::map<int, Process> processes_of(int self, const std::vector<Pod::Member>& members) {
  std::map<int, Process> processes;
  for (const auto& [process, socket] : members) {
    // The kernel gives 0 for a process that has no number in this namespace.
    if (process.is_here() && process.pid == 0) {
      throw std::runtime_error(
          "freeio_jax.initialize: process " + std::to_string(process.number) +
          " of this host is in another PID namespace than process " + std::to_string(self) +
          ", so that neither its memory can be read nor its end be seen. Run both in one "
          "container, or let containers share the "
          "namespace (docker: --pid=host; Kubernetes: shareProcessNamespace: true)");
    }
    processes.emplace(process.number, process);
  }
  return processes;
}

std::map<int, UniqueFd> sockets_of(std::vector<Pod::Member> members) {
  std::map<int, UniqueFd> sockets;
  for (auto& [process, socket] : members) sockets.emplace(process.number, std::move(socket));
  return sockets;
}

}  // namespace

Pod::Pod(int process, std::vector<Member> members)
    : self_{process, getpid(), ""},
      others_(processes_of(process, members)),
      links_(sockets_of(std::move(members))) {}

Pod* Pod::current() { return current_pod.load(std::memory_order_acquire); }

Pod& Pod::start(std::unique_ptr<Pod> pod) {
  Pod* const shared = pod.get();
  shared->links_.start(
      [shared](int process, std::string_view frame, UniqueFd file) {
        shared->receive(process, frame, std::move(file));
      },
      [shared](int process) { shared->depart(process, Departure::kDeath); });
  current_pod.store(pod.release(), std::memory_order_release);
  return *shared;
}

std::vector<Process> Pod::others() const {
  std::vector<Process> processes;
  for (const auto& [number, process] : others_) processes.push_back(process);
  return processes;
}

std::string Pod::who(int process) const {
  return process == self_.number ? self_.who() : others_.at(process).who();
}

void Pod::send(int process, Channel channel, std::string_view text, int file) {
  links_.send(process, frame_of(static_cast<uint32_t>(channel), text), file);
}

void Pod::leave() {
  if (getpid() != self_.pid) return;
  std::vector<Guest*> guests;
  {
    std::lock_guard lock(mutex_);
    if (has_left_) return;
    has_left_ = true;
    for (const Seat& seat : seats_) {
      if (seat.guest != nullptr) guests.push_back(seat.guest);
    }
  }
  // This comes before the last messages of the guests, so the peers know why these come.
  for (const auto& [number, process] : others_) links_.send(number, frame_of(kLeaving, ""));
  for (Guest* const guest : guests) guest->leaving();
  links_.stop();
}

void Pod::admit(Channel channel, Guest& guest) {
  Seat& seat = seats_[static_cast<size_t>(channel)];
  std::unique_lock lock(mutex_);
  // New messages must not overtake earlier ones. So they wait until those are handed over.
  while (!seat.waiting.empty()) {
    const auto calls = std::exchange(seat.waiting, {});
    lock.unlock();
    for (const auto& call : calls) call(guest);
    lock.lock();
  }
  seat.guest = &guest;
}

void Pod::receive(int process, std::string_view frame, UniqueFd file) {
  uint32_t number = 0;
  if (frame.size() < sizeof(number)) return depart(process, Departure::kGarbage);
  std::memcpy(&number, frame.data(), sizeof(number));
  if (number == kLeaving) return depart(process, Departure::kOrderly);
  if (number >= kNumChannels) return depart(process, Departure::kGarbage);
  const std::string_view text = frame.substr(sizeof(number));
  Seat& seat = seats_[number];
  Guest* guest = nullptr;
  {
    std::lock_guard lock(mutex_);
    guest = seat.guest;
    if (guest == nullptr) {
      // A std::function must be copyable, and a file is not.
      seat.waiting.push_back([this, process, kept = std::string(text),
                              shared = std::make_shared<UniqueFd>(std::move(file))](Guest& late) {
        hand_over(late, process, kept, std::move(*shared));
      });
      return;
    }
  }
  hand_over(*guest, process, text, std::move(file));
}

void Pod::hand_over(Guest& guest, int process, std::string_view text, UniqueFd file) {
  try {
    guest.received(process, text, std::move(file));
  } catch (const std::runtime_error&) {
    depart(process, Departure::kGarbage);
  }
}

// Only the first departure of a process counts: a process that has said that it leaves also closes
// its link.
void Pod::depart(int process, Departure how) {
  std::vector<Guest*> guests;
  {
    std::lock_guard lock(mutex_);
    if (!gone_.insert(process).second) return;
    for (Seat& seat : seats_) {
      if (seat.guest != nullptr) {
        guests.push_back(seat.guest);
      } else {
        seat.waiting.push_back([process, how](Guest& late) { late.gone(process, how); });
      }
    }
  }
  for (Guest* const guest : guests) guest->gone(process, how);
}

}  // namespace freeio::pod
