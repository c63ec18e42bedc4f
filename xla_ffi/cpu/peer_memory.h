// Reads the memory of other processes of this host by cross-memory attach. This needs no shared
// segment, which could run full or stay behind, and no copy by the owner.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pod/process.h"

namespace freeio::cpu {

// What the peers of a process read of its state. It is at the same address until the process ends.
struct ControlBlock {
  uint64_t nonce = 0;                 // random, so that a later process with the same pid differs
  std::atomic<uint64_t> give_ups{0};  // exchanges whose buffers XLA got before all peers were done
};

// That of this process.
ControlBlock& control_block();

// The control block of another process.
struct RemoteControlBlock {
  uint64_t address;
  uint64_t nonce;
};

// Asks the kernel to let all processes of this user read this one, if Yama allows only its parents.
void allow_peers_to_read();

// The memory of a peer could not be read. The text says which peer, and why.
class ReadError : public std::runtime_error {
 public:
  ReadError(const pod::Process& process, int error);

  int process() const { return process_; }  // its number
  bool peer_ended() const;

 private:
  int process_;
  int error_;
};

class PeerMemory {
 public:
  PeerMemory(const pod::Process& process, const RemoteControlBlock& control_block)
      : process_(process), control_block_(control_block) {}

  struct Span {
    const void* remote;
    void* local;
    size_t bytes;
  };

  // Throws ReadError if the kernel refuses, or if the peer has no memory at these addresses.
  void read(const std::vector<Span>& spans) const;

  // The present give_ups of the peer's control block. Throws ReadError if the peer has ended, also
  // if another process has its pid now.
  uint64_t give_ups() const;

  const pod::Process& process() const { return process_; }

 private:
  pod::Process process_;
  RemoteControlBlock control_block_;
};

// Rows to read from peers. Each entry of a request costs about 0.6 us in addition to its bytes. So
// neighbouring rows are read together, and a row that is wanted twice is read once.
class Gather {
 public:
  void add(const PeerMemory& peer, const void* remote, void* local, size_t bytes) {
    if (bytes > 0) wanted_.push_back({&peer, static_cast<const std::byte*>(remote), local, bytes});
  }
  bool empty() const { return wanted_.empty(); }

  // Throws as PeerMemory::read.
  void run();

 private:
  struct Wanted {
    const PeerMemory* peer;
    const std::byte* remote;
    void* local;
    size_t bytes;
  };
  std::vector<Wanted> wanted_;
};

}  // namespace freeio::cpu
