// GPUs of the other processes of this host: their GPU blocks, and the memory that XLA's buffers
// lie in.
//
// XLA takes its buffers from few large allocations, here called regions. A process exports each of
// its own when a call first needs it, and makes that call only when all peers have it mapped; then
// an address is a region's number and an offset, and every GPU knows where it sees that region.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "cuda/gpu_block.h"
#include "cuda/memory.h"
#include "pod/guest.h"
#include "pod/pod.h"

namespace freeio::cuda {

// One GPU of this process.
struct OwnGpu {
  int gpu;  // its number among all of the host that take part
  int ordinal;
  GpuBlock* block;
  HostBlock* host;
  const Allocation* allocation;  // of the GPU block
  size_t bytes;
};

// A region of this process that all peers have mapped.
struct SharedRegion {
  uint32_t number = 0;
  AddressRange range;
  uint64_t identity = 0;

  // `identity`: of the memory at the address.
  bool contains(uint64_t address, uint64_t its_identity) const {
    return identity == its_identity && address - range.base < range.bytes;
  }
  // An address in it as the peers are told.
  uint64_t shared_address(uint64_t address) const {
    return static_cast<uint64_t>(number) << kRegionShift | (address - range.base);
  }
};

class Peers final : public pod::Guest {
 public:
  // `processes`: which process has each GPU. The pointers in `own` stay good until the end.
  Peers(pod::Pod& pod, int process, std::map<int, int> processes, std::vector<OwnGpu> own);
  ~Peers() override;

  // Shows the GPU blocks of this process to the others, and maps theirs. Every process must
  // call it; waits at most `timeout` seconds.
  Status connect(double timeout);

  // Null: not a GPU of another process, or not connected.
  GpuBlock* block(int gpu) const;

  // The region that `pointer` lies in. Shows it to the other processes if it is new, and waits at
  // most `timeout` seconds until all have it mapped.
  Status share(const void* pointer, double timeout, SharedRegion& shared);

  // "process 1 (pid 77)"; empty for a GPU of this process.
  std::string who(int gpu) const;

  // Unmaps what the peers have shown, and forgets this process's GPUs. No kernel may run any more.
  void release();

  // Of other processes, mapped here.
  size_t mapped_bytes() const;

  void received(int process, std::string_view text, pod::UniqueFd file) override;
  void gone(int process, pod::Departure how) override;

 private:
  struct Note;
  struct Region : SharedRegion {
    std::set<int> awaited;  // processes that have not mapped it yet
    std::string refusal;    // of one that cannot
  };

  void send(int process, const Note& note, const std::string& text = "", int file = -1);
  Status map_file(const pod::UniqueFd& file, size_t bytes, Mapping& mapping) const;
  Status map_block(const Note& note, const pod::UniqueFd& file);
  Status map_region(int process, const Note& note, const pod::UniqueFd& file);
  Status enter_base(int process, uint32_t region, uint64_t base) const;
  Status publish(const void* pointer, Region& region);
  std::vector<int> ordinals() const;

  pod::Pod& pod_;
  const int process_;
  const std::map<int, int> processes_;  // of each GPU
  const std::vector<OwnGpu> own_;
  std::vector<void*> streams_;  // of the own GPUs, beside XLA's
  std::mutex serving_;          // held while a message is dealt with
  bool released_ = false;       // what comes now is for nobody. With `serving_` locked
  mutable std::mutex mutex_;    // of all below
  std::condition_variable changed_;
  std::set<int> others_;  // processes, as long as they are there
  std::map<int, std::string> lost_;
  std::map<int, Mapping> blocks_;  // by GPU
  std::list<Region> regions_;      // of this process
  std::list<Mapping> mappings_;    // of the peers' regions
  std::string failure_;            // of a GPU block that could not be mapped
};

}  // namespace freeio::cuda
