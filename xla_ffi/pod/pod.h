// The processes of this host that take part in one program, and the channels between them.
//
// The pod knows which processes take part, who has gone, and which guest has each channel. What
// travels on a channel is its guest's affair.
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
  // Another process of this host.
  struct Member {
    Process process;
    UniqueFd socket;  // connected with it
  };

  // Nothing is received before start(). `elsewhere`: processes of the program on other hosts.
  // Throws std::runtime_error where the kernel could not tell of the end of a member.
  Pod(int process, std::vector<Member> members, std::vector<int> elsewhere);

  // Begins to receive, and makes `pod` the current one. It is never freed: XLA may call the engines
  // until the process ends.
  static Pod& start(std::unique_ptr<Pod> pod);

  // Null before the first start().
  static Pod* current();

  // From now on `guest` gets what comes on the channel, after what has come before. It must stay
  // until the process ends, or until the pod is destroyed without a start.
  void admit(Channel channel, Guest& guest);

  // To the guest of another process. Never blocks, and throws as Links::send. `file` stays the
  // caller's; -1: none.
  void send(int process, Channel channel, std::string_view text, int file = -1);

  // Tells the other processes that this one leaves, and closes the links. In a child that was
  // forked from this process it does nothing: the child is in no pod.
  void leave();

  const Process& self() const { return self_; }
  std::vector<Process> others() const;  // whether or not they have gone
  const std::vector<int>& elsewhere() const { return elsewhere_; }

  std::string who(int process) const;  // "process 1 (pid 77)"

 private:
  // Of one channel.
  struct Seat {
    Guest* guest = nullptr;
    std::vector<std::function<void(Guest&)>> waiting;  // calls from before the guest came
  };

  void receive(int process, std::string_view frame, UniqueFd file);
  void hand_over(Guest& guest, int process, std::string_view text, UniqueFd file);
  void depart(int process, Departure how);

  const Process self_;
  const std::map<int, Process> others_;  // by number
  const std::vector<int> elsewhere_;
  Links links_;  // has a lock of its own: sending takes no other

  // Guards all below. No other lock is taken while it is held, and no guest is called.
  std::mutex mutex_;
  bool has_left_ = false;
  std::set<int> gone_;
  std::array<Seat, kNumChannels> seats_;
};

}  // namespace freeio::pod
