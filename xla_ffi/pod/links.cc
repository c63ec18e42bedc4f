#include "pod/links.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <utility>

namespace freeio::pod {
namespace {

// Bytes of one message. Messages of the engines have some hundred bytes.
constexpr size_t kMaxMessage = 1 << 20;

[[noreturn]] void fail(const char* call) {
  throw std::system_error(errno, std::system_category(), call);
}

// One message as the kernel takes it: bytes, and room for one file descriptor beside them.
struct Packet {
  iovec bytes;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header = {};

  Packet(void* data, size_t size) : bytes{data, size} {
    header.msg_iov = &bytes;
    header.msg_iovlen = 1;
  }
  Packet(const Packet&) = delete;
  Packet& operator=(const Packet&) = delete;

  void offer_file() {
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
  }
  void attach(int file) {
    offer_file();
    cmsghdr* entry = CMSG_FIRSTHDR(&header);
    entry->cmsg_level = SOL_SOCKET;
    entry->cmsg_type = SCM_RIGHTS;
    entry->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(entry), &file, sizeof(file));
  }
  UniqueFd take_file() {
    int file = -1;
    for (cmsghdr* entry = CMSG_FIRSTHDR(&header); entry != nullptr;
         entry = CMSG_NXTHDR(&header, entry)) {
      if (entry->cmsg_level == SOL_SOCKET && entry->cmsg_type == SCM_RIGHTS) {
        std::memcpy(&file, CMSG_DATA(entry), sizeof(file));
      }
    }
    return UniqueFd(file);
  }
};

bool is_stream(int socket) {
  int type = 0;
  socklen_t size = sizeof(type);
  if (getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &size) != 0) fail("getsockopt of a link");
  return type == SOCK_STREAM;
}

// The length of a message, as it travels in front of it on a stream. Both ends have the same byte
// order, which freeio_jax.initialize() has checked.
using Length = uint32_t;

std::string with_length(std::string_view message) {
  const auto length = static_cast<Length>(message.size());
  std::string framed(reinterpret_cast<const char*>(&length), sizeof(length));
  framed += message;
  return framed;
}

ssize_t send_packet(int socket, std::string_view message, int file) {
  Packet packet(const_cast<char*>(message.data()), message.size());
  if (file >= 0) packet.attach(file);
  return sendmsg(socket, &packet.header, MSG_DONTWAIT | MSG_NOSIGNAL);
}

// Whether a failed send shows that the peer cannot be reached any more.
bool is_broken(int error) {
  return error == EPIPE || error == ECONNRESET || error == ETIMEDOUT || error == EHOSTUNREACH ||
         error == ENETUNREACH || error == ENETDOWN;
}

// A file that becomes readable when the process at the other end of the socket ends. (The socket
// does not show this while a child of that process keeps the other end open.) -1: the kernel does
// not offer such a file (before Linux 5.3).
UniqueFd process_of(int socket) {
  constexpr int kSoPeerPidfd = 77;  // SO_PEERPIDFD, since Linux 6.5
  int file = -1;
  socklen_t size = sizeof(file);
  if (getsockopt(socket, SOL_SOCKET, kSoPeerPidfd, &file, &size) == 0) return UniqueFd(file);
  ucred peer = {};
  size = sizeof(peer);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.pid <= 0) return {};
  return UniqueFd(static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0)));
}

}  // namespace

// A forked child shares the sockets. If it used or kept them, the peers would notice, so it closes
// them.
void Links::close_in_children() {
  static const int error = pthread_atfork(
      [] {
        if (current_) current_->mutex_.lock();
      },
      [] {
        if (current_) current_->mutex_.unlock();
      },
      [] {
        if (!current_) return;
        current_->links_.clear();
        current_->mutex_.unlock();
        current_ = nullptr;
      });
  if (error != 0) {
    errno = error;
    fail("pthread_atfork");
  }
}

Links::Links(std::map<int, UniqueFd> sockets)
    : buffer_(kMaxMessage), wake_up_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wake_up_.get() < 0) fail("eventfd");
  for (auto& [process, socket] : sockets) {
    Link& link = links_[process];
    link.process = process_of(socket.get());
    link.is_stream = is_stream(socket.get());
    link.socket = std::move(socket);
  }
}

Links::~Links() {
  stop();
  if (current_ == this) current_ = nullptr;
}

void Links::start(Received received, Lost lost) {
  close_in_children();
  received_ = std::move(received);
  lost_ = std::move(lost);
  thread_ = std::thread([this] { serve(); });
  current_ = this;
}

void Links::wake() {
  const uint64_t one = 1;
  // This fails only if the counter is full. Then the thread is about to wake anyway.
  (void)!write(wake_up_.get(), &one, sizeof(one));
}

void Links::send(int process, std::string_view message, int file) {
  if (message.size() > kMaxMessage) {
    errno = EMSGSIZE;
    fail("send to a peer");
  }
  std::lock_guard lock(mutex_);
  const auto found = links_.find(process);
  if (found == links_.end()) return;
  Link& link = found->second;
  std::string framed;
  if (link.is_stream) {
    if (file >= 0) {
      errno = EXDEV;
      fail("send of a file to another host");
    }
    framed = with_length(message);
    message = framed;
  }
  if (link.unsent.empty()) {
    const ssize_t sent = send_packet(link.socket.get(), message, file);
    if (sent >= 0 && (!link.is_stream || static_cast<size_t>(sent) == message.size())) return;
    if (sent >= 0) {
      message.remove_prefix(static_cast<size_t>(sent));
    } else if (is_broken(errno)) {
      return;  // the thread will notice this, too
    } else if (errno != EAGAIN && errno != EINTR) {
      fail("send to a peer");
    }
  }
  UniqueFd kept(file >= 0 ? fcntl(file, F_DUPFD_CLOEXEC, 0) : -1);
  if (file >= 0 && kept.get() < 0) fail("dup of a file for a peer");
  link.unsent.push_back({std::string(message), std::move(kept)});
  wake();
}

// Sends the messages that wait for room in the socket. False: the link is broken.
bool Links::flush(Link& link) {
  while (!link.unsent.empty()) {
    Unsent& next = link.unsent.front();
    const ssize_t sent = send_packet(link.socket.get(), next.message, next.file.get());
    if (sent < 0) return errno == EAGAIN || errno == EINTR;
    if (link.is_stream && static_cast<size_t>(sent) < next.message.size()) {
      next.message.erase(0, static_cast<size_t>(sent));
      return true;
    }
    link.unsent.pop_front();
  }
  return true;
}

// Reads all messages that have come. False: the peer has closed its end.
bool Links::receive(int process, Link& link) {
  if (link.is_stream) return receive_stream(process, link);
  while (true) {
    Packet packet(buffer_.data(), buffer_.size());
    packet.offer_file();
    const ssize_t size =
        recvmsg(link.socket.get(), &packet.header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (size > 0) {
      received_(process, {buffer_.data(), static_cast<size_t>(size)}, packet.take_file());
    } else if (size == 0) {
      return false;
    } else if (errno == EAGAIN) {
      return true;
    } else if (errno != EINTR) {
      return false;
    }
  }
}

bool Links::receive_stream(int process, Link& link) {
  std::string& begun = link.begun;
  while (true) {
    const ssize_t size = recv(link.socket.get(), buffer_.data(), buffer_.size(), MSG_DONTWAIT);
    if (size == 0) return false;
    if (size < 0 && errno == EAGAIN) return true;
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return false;
    begun.append(buffer_.data(), static_cast<size_t>(size));
    size_t read = 0;
    Length length = 0;
    while (begun.size() - read >= sizeof(length)) {
      std::memcpy(&length, begun.data() + read, sizeof(length));
      if (length > kMaxMessage) return false;
      if (begun.size() - read - sizeof(length) < length) break;
      read += sizeof(length);
      received_(process, std::string_view(begun).substr(read, length), {});
      read += length;
    }
    begun.erase(0, read);
  }
}

void Links::serve() {
  std::vector<pollfd> polled;
  std::vector<int> processes;
  std::vector<Link*> links;  // only this thread and stop(), which waits for it, take links away
  while (true) {
    polled.assign(1, {wake_up_.get(), POLLIN, 0});
    processes.assign(1, -1);
    links.assign(1, nullptr);
    {
      std::lock_guard lock(mutex_);
      if (is_stopping_) return;
      for (auto& [process, link] : links_) {
        const bool full = !link.unsent.empty();
        polled.push_back({link.socket.get(), static_cast<short>(POLLIN | (full ? POLLOUT : 0)), 0});
        processes.push_back(process);
        links.push_back(&link);
        // Ignored by poll() where there is none.
        polled.push_back({link.process.get(), POLLIN, 0});
        processes.push_back(process);
        links.push_back(&link);
      }
    }
    if (poll(polled.data(), polled.size(), -1) < 0) continue;  // EINTR
    if (polled[0].revents != 0) {
      uint64_t count;
      (void)!read(wake_up_.get(), &count, sizeof(count));
    }
    for (size_t i = 1; i < polled.size(); i += 2) {
      const short revents = polled[i].revents;
      const bool ended = polled[i + 1].revents != 0;
      if (revents == 0 && !ended) continue;
      bool alive = (revents & ~POLLOUT) == 0 && !ended;
      if (!alive) alive = receive(processes[i], *links[i]) && !ended;
      std::unique_lock lock(mutex_);
      alive = alive && flush(*links[i]);
      if (alive) continue;
      links_.erase(processes[i]);
      lock.unlock();
      lost_(processes[i]);
    }
  }
}

void Links::stop() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  {
    std::unique_lock lock(mutex_);
    if (is_stopping_) return;
    const auto unsent = [this] {
      for (auto& [process, link] : links_) {
        if (flush(link) && !link.unsent.empty()) return true;
      }
      return false;
    };
    while (unsent() && std::chrono::steady_clock::now() < deadline) {
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      lock.lock();
    }
    is_stopping_ = true;
  }
  wake();
  if (thread_.joinable()) thread_.join();
  // An exchange that still runs may be sending.
  std::lock_guard lock(mutex_);
  links_.clear();
}

}  // namespace freeio::pod
