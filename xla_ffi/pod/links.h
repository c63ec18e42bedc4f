// Messages between the processes of a pod, over connected sockets that keep their boundaries. A
// message may bring a file descriptor along: the receiver gets one of its own for the same file.
#pragma once

#include <sys/types.h>

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "pod/unique_fd.h"

namespace freeio::pod {

class Links {
 public:
  using Received = std::function<void(int process, std::string_view message, UniqueFd file)>;

  // `received` and `lost` (the peer's end is closed, or its process has ended) are called on the
  // thread that serves all links; what a peer has sent is received before it is lost. A child that
  // is forked from this process has no links.
  Links(std::map<int, UniqueFd> sockets, Received received, std::function<void(int)> lost);
  ~Links();

  // Never blocks. Messages to one process arrive in order; those to a lost one go nowhere. `file`
  // stays the caller's; -1: none. Throws std::system_error where the kernel refuses the message.
  void send(int process, std::string_view message, int file = -1);

  // Closes all links, after what was sent before has left, or a second has passed.
  void stop();

 private:
  struct Unsent {
    std::string message;
    UniqueFd file;
  };
  struct Link {
    UniqueFd socket;
    UniqueFd process;  // readable when it has ended; none where the kernel has no such file
    std::deque<Unsent> unsent;  // the socket was full
  };

  void serve();
  bool receive(int process, int socket);
  bool flush(Link& link);
  void wake();

  static void forget_in_children(Links* links);

  const Received received_;
  const std::function<void(int)> lost_;
  UniqueFd wake_up_;
  std::mutex mutex_;  // of all below
  std::map<int, Link> links_;
  bool stopping_ = false;
  std::vector<char> buffer_;
  std::thread thread_;
};

}  // namespace freeio::pod
