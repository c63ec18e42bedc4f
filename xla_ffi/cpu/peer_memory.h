// The memory of other processes of this host, read by cross-memory attach: no segment that could
// run full or stay behind, and no copy that the owner would have to make.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pod/process.h"

namespace freeio::cpu {

// What a process shows of itself at a fixed address, for as long as it lives.
struct ControlBlock {
  uint64_t nonce = 0;                 // random: tells the process from a later one with its number
  std::atomic<uint64_t> give_ups{0};  // exchanges whose buffers were released before all had read
};

// This process's own.
ControlBlock& control_block();

// Where another process shows its own.
struct RemoteControlBlock {
  uint64_t address;
  uint64_t nonce;
};

// Has the kernel let processes of this user read this one, where Yama restricts that to parents.
void allow_peers_to_read();

// The memory of a peer could not be read; says whose, and why.
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

  // Throws ReadError where the kernel refuses or the addresses are not the peer's.
  void read(const std::vector<Span>& spans) const;

  // The peer's control_block().give_ups now. Throws where it is another process by now.
  uint64_t give_ups() const;

  const pod::Process& process() const { return process_; }

 private:
  pod::Process process_;
  RemoteControlBlock control_block_;
};

// Rows wanted from peers. Reading one costs about 0.6 us beside its bytes, so neighbours and rows
// wanted twice are read together.
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
