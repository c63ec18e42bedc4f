// The GPUs of the other processes of this host. Their GPU blocks and XLA's buffers on them are
// mapped into this process.
//
// XLA takes its buffers from a few large allocations, here called regions. A process exports one of
// its regions when a call first needs it, and makes that call only after all peers have mapped the
// region. By then every GPU of the peers has a table entry that says where it sees the region. So
// an address for the peers is a region's number and an offset.
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
  int gpu;  // its GPU number
  int ordinal;
  GpuBlock* block;  // of the first lane
  int64_t block_bytes;
  HostBlock* host;
  const Allocation* allocation;  // of the GPU blocks
  size_t bytes;

  GpuBlock* block_of(int lane) const { return block_of_lane(block, lane, block_bytes); }
};

// A region of this process that all peers have mapped.
struct SharedRegion {
  uint32_t number = 0;
  AddressRange range;
  uint64_t allocation_id = 0;

  // `its_allocation_id`: that of the memory at the address.
  bool contains(uint64_t address, uint64_t its_allocation_id) const {
    return allocation_id == its_allocation_id && address - range.base < range.bytes;
  }
  // The address for the peers, of an address in this region.
  uint64_t shared_address(uint64_t address) const {
    return static_cast<uint64_t>(number) << kRegionShift | (address - range.base);
  }
};

WhyGone why_gone(pod::Departure how);

class Peers final : public pod::Guest {
 public:
  // `processes`: which process has each GPU. The pointers in `own` must be valid until release().
  Peers(pod::Pod& pod, int process, std::map<int, int> processes, std::vector<OwnGpu> own);
  ~Peers() override;

  // Exports the GPU blocks of this process to the others, and waits until theirs are mapped here,
  // at most `timeout` seconds. Every process must call it.
  Status connect(double timeout);

  // The GPU block of the first lane on a GPU of another process; null: it is not mapped here.
  GpuBlock* block(int gpu) const;

  // Finds the region that `pointer` lies in. Exports it to the other processes if it is new, and
  // waits until all of them have mapped it, at most `timeout` seconds.
  Status share(const void* pointer, double timeout, SharedRegion& shared);

  // "process 1 (pid 77)"; empty for a GPU of this process.
  std::string who(int gpu) const;

  // Unmaps all memory of the peers, and ignores their messages from now on. No kernel may run any
  // more.
  void release();

  // How much memory of other processes is mapped here.
  size_t mapped_bytes() const;

  void received(int process, std::string_view text, pod::UniqueFd file) override;
  void gone(int process, pod::Departure how) override;

 private:
  struct Message;
  struct Region : SharedRegion {
    std::set<int> pending;  // processes that have not mapped it yet
    std::string refusal;    // the error of a process that cannot map it; empty: there is none
  };

  void send(int process, const Message& message, const std::string& text = "", int file = -1);
  Status map_file(const pod::UniqueFd& file, size_t bytes, Mapping& mapping) const;
  Status map_block(int process, const Message& message, const pod::UniqueFd& file);
  Status map_region(int process, const Message& message, const pod::UniqueFd& file);
  Status enter_base(int process, uint32_t region, uint64_t base) const;
  Status publish(const void* pointer, Region& region);
  std::vector<int> ordinals() const;

  pod::Pod& pod_;
  const int process_;
  const std::map<int, int> processes_;  // of each GPU
  const std::vector<OwnGpu> own_;
  std::vector<void*> streams_;  // one of each GPU in own_, for copies that do not wait for XLA's

  // Held while a message or a departure is handled, and by release(). Locked before mutex_.
  std::mutex serving_;
  bool has_released_ = false;  // guarded by serving_

  // Guards all below.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::set<int> others_;                   // processes that still take part
  std::map<int, std::string> departures_;  // by process: a sentence that says how it left
  std::map<int, Mapping> blocks_;          // by GPU
  std::list<Region> regions_;              // of this process
  std::list<Mapping> mappings_;            // of the peers' regions
  std::string failure_;  // why a GPU block could not be mapped; empty: none failed
};

}  // namespace freeio::cuda
