// The memory of other processes of this host, read by cross-memory attach: no segment that could
// run full or stay behind, and no copy that the owner would have to make.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace freeio::cpu {

// What a process shows of itself at a fixed address, for as long as it lives.
struct ControlBlock {
  uint64_t nonce = 0;                 // random: tells the process from a later one with its number
  std::atomic<uint64_t> give_ups{0};  // exchanges whose buffers were released before all had read
};

// This process's own.
ControlBlock& control_block();

// Has the kernel let processes of this user read this one, where Yama restricts that to parents.
void allow_peers_to_read();

class PeerMemory;

// The memory of a peer could not be read; says whose, and why.
class ReadError : public std::runtime_error {
 public:
  ReadError(const PeerMemory& peer, int error);

  int process() const { return process_; }
  bool peer_ended() const;

 private:
  int process_;
  int error_;
};

class PeerMemory {
 public:
  PeerMemory(int process, int pid, uint64_t control_address, uint64_t nonce)
      : process_(process), pid_(pid), control_(control_address), nonce_(nonce) {}

  struct Span {
    const void* remote;
    void* local;
    size_t bytes;
  };

  // Throws ReadError where the kernel refuses or the addresses are not the peer's.
  void read(const std::vector<Span>& spans) const;

  // The peer's control_block().give_ups now. Throws where it is another process by now.
  uint64_t give_ups() const;

  int process() const { return process_; }
  int pid() const { return pid_; }
  std::string who() const;  // "process 1 (pid 77)"

 private:
  int process_;
  int pid_;
  uint64_t control_;
  uint64_t nonce_;
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
