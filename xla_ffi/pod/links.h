// Messages between the processes of a pod, over connected sockets. Within a host the sockets keep
// the boundaries of messages, and a message may carry a file descriptor. The receiver gets a
// descriptor of its own for the same file. Between hosts the sockets are streams. Each message
// begins with its length there.
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
  using Lost = std::function<void(int process)>;

  // `sockets`: by number of the process at the other end.
  explicit Links(std::map<int, UniqueFd> sockets);
  ~Links();

  // Starts the thread that serves all links. It calls `received` for each message. It calls `lost`
  // when the process has closed its end or has ended, after `received` for all that the process
  // sent. From now on a child that is forked from this process has no links.
  void start(Received received, Lost lost);

  // Sends a message, and never blocks. Messages to one process arrive in order. A message to a lost
  // process is dropped. The caller keeps `file`; -1: none. Throws std::system_error if the kernel
  // refuses the message, or a file is to cross to another host.
  void send(int process, std::string_view message, int file = -1);

  // Closes all links when all messages have left this process, or after a second.
  void stop();

 private:
  struct Unsent {
    std::string message;
    UniqueFd file;
  };
  struct Link {
    UniqueFd socket;
    UniqueFd process;           // readable when it has ended; -1: the kernel offers no such file
    std::deque<Unsent> unsent;  // waits for room in the socket
    bool is_stream = false;
    std::string begun;  // of a stream: the bytes that have come of a message. The thread's alone
  };

  void serve();
  bool receive(int process, Link& link);
  bool receive_stream(int process, Link& link);
  bool flush(Link& link);
  void wake();

  static void close_in_children();

  static inline Links* current_ = nullptr;  // a forked child closes these

  // Set by start(), before the thread.
  Received received_;
  Lost lost_;
  std::vector<char> buffer_;  // used by the thread alone
  UniqueFd wake_up_;
  std::thread thread_;

  // Guards all below. The callbacks are called without it.
  std::mutex mutex_;
  std::map<int, Link> links_;
  bool is_stopping_ = false;
};

}  // namespace freeio::pod
