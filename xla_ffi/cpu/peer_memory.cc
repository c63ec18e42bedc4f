#include "cpu/peer_memory.h"

#include <sys/prctl.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>

namespace freeio::cpu {
namespace {

// To read this many bytes that are not wanted takes less time than another entry of the request
// (0.6 us, at 5 GB/s).
constexpr size_t kWorthReadingOver = 3 << 10;

// Bytes of rows that are read together: they go through a buffer, whose size this bounds.
constexpr size_t kMaxTogether = 1 << 20;

// The kernel's IOV_MAX.
constexpr size_t kMaxEntries = 1024;

std::string explain(const pod::Process& process, int error) {
  if (error == ESRCH) return process.who() + " ended";
  std::string text = "the memory of " + process.who() +
                     " cannot be read: process_vm_readv: " + std::system_category().message(error);
  if (error == EPERM) {
    text +=
        ". The kernel forbids reading the memory of that process. Exchanges between processes "
        "need it: the same user for all, dumpable processes, kernel.yama.ptrace_scope at most 1, "
        "and in containers a seccomp profile that allows process_vm_readv (docker: "
        "--cap-add=SYS_PTRACE)";
  } else if (error == ENOSYS) {
    text += ". This kernel is built without CONFIG_CROSS_MEMORY_ATTACH";
  }
  return text;
}

}  // namespace

ReadError::ReadError(const pod::Process& process, int error)
    : std::runtime_error(explain(process, error)), process_(process.number), error_(error) {}

bool ReadError::peer_ended() const { return error_ == ESRCH; }

ControlBlock& control_block() {
  static ControlBlock* const block = [] {
    auto fresh = std::make_unique<ControlBlock>();
    std::random_device random;
    fresh->nonce = (static_cast<uint64_t>(random()) << 32) | random();
    return fresh.release();  // peers may read it until the process ends
  }();
  return *block;
}

void allow_peers_to_read() {
  int scope = 0;
  std::ifstream("/proc/sys/kernel/yama/ptrace_scope") >> scope;
  if (scope == 1 && prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY) != 0) {
    throw std::system_error(errno, std::system_category(), "prctl(PR_SET_PTRACER)");
  }
}

void PeerMemory::read(const std::vector<Span>& spans) const {
  std::vector<iovec> local, remote;
  for (size_t first = 0; first < spans.size(); first += kMaxEntries) {
    const size_t last = std::min(spans.size(), first + kMaxEntries);
    local.clear();
    remote.clear();
    for (size_t i = first; i < last; ++i) {
      local.push_back({spans[i].local, spans[i].bytes});
      remote.push_back({const_cast<void*>(spans[i].remote), spans[i].bytes});
    }
    // The kernel may read less than the request. Then the next request begins after that.
    size_t next = 0;
    while (next < local.size()) {
      const ssize_t moved = process_vm_readv(process_.pid, &local[next], local.size() - next,
                                             &remote[next], remote.size() - next, 0);
      if (moved < 0) {
        if (errno == EINTR) continue;
        throw ReadError(process_, errno);
      }
      if (moved == 0) throw ReadError(process_, EFAULT);
      for (size_t rest = static_cast<size_t>(moved); rest > 0;) {
        const size_t step = std::min(rest, local[next].iov_len);
        for (iovec* entry : {&local[next], &remote[next]}) {
          entry->iov_base = static_cast<char*>(entry->iov_base) + step;
          entry->iov_len -= step;
        }
        rest -= step;
        if (local[next].iov_len == 0) ++next;
      }
    }
  }
}

uint64_t PeerMemory::give_ups() const {
  uint64_t block[2] = {};
  static_assert(sizeof(ControlBlock) == sizeof(block));
  read({{reinterpret_cast<const void*>(control_block_.address), block, sizeof(block)}});
  if (block[0] != control_block_.nonce) throw ReadError(process_, ESRCH);
  return block[1];
}

void Gather::run() {
  std::sort(wanted_.begin(), wanted_.end(), [](const Wanted& a, const Wanted& b) {
    return std::make_tuple(a.peer, a.remote) < std::make_tuple(b.peer, b.remote);
  });
  struct Together {
    size_t first, last;  // of wanted_
    size_t offset;       // in `staged`
  };
  std::vector<PeerMemory::Span> spans;
  std::vector<Together> groups;
  std::vector<size_t> span_of_group;
  size_t staged_bytes = 0;
  size_t first = 0;
  const auto flush = [&](size_t end_of_peer) {
    std::vector<std::byte> staged(staged_bytes);
    for (size_t g = 0; g < groups.size(); ++g) {
      spans[span_of_group[g]].local = staged.data() + groups[g].offset;
    }
    if (!spans.empty()) wanted_[first].peer->read(spans);
    for (const Together& group : groups) {
      const std::byte* begin = wanted_[group.first].remote;
      for (size_t i = group.first; i < group.last; ++i) {
        std::memcpy(wanted_[i].local, staged.data() + group.offset + (wanted_[i].remote - begin),
                    wanted_[i].bytes);
      }
    }
    spans.clear();
    groups.clear();
    span_of_group.clear();
    staged_bytes = 0;
    first = end_of_peer;
  };
  for (size_t i = 0; i < wanted_.size();) {
    if (wanted_[i].peer != wanted_[first].peer || staged_bytes > kMaxTogether) flush(i);
    const std::byte* begin = wanted_[i].remote;
    const std::byte* end = begin + wanted_[i].bytes;
    size_t next = i + 1;
    while (next < wanted_.size() && wanted_[next].peer == wanted_[i].peer &&
           wanted_[next].remote <= end + kWorthReadingOver &&
           end - begin < static_cast<ptrdiff_t>(kMaxTogether)) {
      end = std::max(end, wanted_[next].remote + wanted_[next].bytes);
      ++next;
    }
    const size_t bytes = static_cast<size_t>(end - begin);
    if (next == i + 1) {
      spans.push_back({begin, wanted_[i].local, bytes});  // straight to its place
    } else {
      span_of_group.push_back(spans.size());
      groups.push_back({i, next, staged_bytes});
      spans.push_back({begin, nullptr, bytes});
      staged_bytes += bytes;
    }
    i = next;
  }
  flush(wanted_.size());
  wanted_.clear();
}

}  // namespace freeio::cpu
