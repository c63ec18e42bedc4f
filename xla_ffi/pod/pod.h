// The processes that take part in one program, and the channels between them.
//
// The pod knows which processes take part, which have gone, and which guest has each channel. It
// does not know what the messages on a channel mean.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/channels.h"
#include "pod/guest.h"
#include "pod/links.h"
#include "pod/process.h"

namespace freeio::pod {

class Pod {
 public:
  // Another process.
  struct Member {
    Process process;
    UniqueFd socket;  // connected with this process
  };

  // Nothing is received before start(). Throws std::runtime_error if a member on this host is in
  // another PID namespace.
  Pod(int process, std::vector<Member> members);

  // Begins to receive, and makes `pod` the current one. It is never freed: XLA may call the engines
  // until the process ends.
  static Pod& start(std::unique_ptr<Pod> pod);

  // Null before the first start().
  static Pod* current();

  // Hands all messages on the channel to `guest`, first those that have already come. The guest
  // must exist until the process ends, or until a pod that was never started is destroyed.
  void admit(Channel channel, Guest& guest);

  // Sends a message to the guest of the same channel in another process. As Links::send.
  void send(int process, Channel channel, std::string_view text, int file = -1);

  // Tells the other processes that this one leaves, and closes the links. Does nothing in a child
  // that was forked from this process, because the child is in no pod.
  void leave();

  const Process& self() const { return self_; }
  std::vector<Process> others() const;  // all, also those that have gone

  std::string who(int process) const;  // "process 1 (pid 77)"

 private:
  // Of one channel.
  struct Seat {
    Guest* guest = nullptr;
    std::vector<std::function<void(Guest&)>> waiting;  // calls for the guest that will come
  };

  void receive(int process, std::string_view frame, UniqueFd file);
  void hand_over(Guest& guest, int process, std::string_view text, UniqueFd file);
  void depart(int process, Departure how);

  const Process self_;
  const std::map<int, Process> others_;  // by number
  Links links_;                          // has a lock of its own, the only one that sending takes

  // Guards all below. While it is held, no other lock is taken and no guest is called.
  std::mutex mutex_;
  bool has_left_ = false;
  std::set<int> gone_;
  std::array<Seat, kNumChannels> seats_;
};

}  // namespace freeio::pod
