// Messages between the processes of a pod, over connected sockets that keep their boundaries.
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

#include "host/unique_fd.h"

namespace freeio::host {

class Links {
 public:
  // `received` and `lost` (the peer's end is closed) are called on the thread that serves all
  // links; what a peer has sent is received before it is lost.
  Links(std::map<int, UniqueFd> sockets, std::function<void(int, std::string_view)> received,
        std::function<void(int)> lost);
  ~Links() { stop(); }

  // Never blocks. Messages to one process arrive in order; those to a lost one go nowhere. Throws
  // std::system_error where the kernel refuses the message.
  void send(int process, std::string_view message);

  // Closes all links, after what was sent before has left, or a second has passed.
  void stop();

 private:
  struct Link {
    UniqueFd socket;
    std::deque<std::string> unsent;  // the socket was full
  };

  void serve();
  bool receive(int process, int socket);
  bool flush(Link& link);
  void wake();

  const std::function<void(int, std::string_view)> received_;
  const std::function<void(int)> lost_;
  UniqueFd wake_up_;
  std::mutex mutex_;  // of all below
  std::map<int, Link> links_;
  bool stopping_ = false;
  std::vector<char> buffer_;
  std::thread thread_;
};

}  // namespace freeio::host
