// XLA's memory, out of which rows are put to other hosts.
//
// XLA takes its buffers from a few large allocations. Each is exposed to the network as a whole
// when a call first puts something out of it.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "core/status.h"
#include "cuda/memory.h"

namespace freeio::cuda {

class Sources {
 public:
  virtual ~Sources() = default;

  // Exposes the allocation that the pointer lies in, unless that was done before.
  Status expose(const void* pointer);

 protected:
  virtual Status expose_region(void* base, size_t bytes) = 0;
  virtual void hide_region(void* base) = 0;

 private:
  struct Region {
    AddressRange range;
    uint64_t allocation_id;
  };

  std::mutex mutex_;
  std::vector<Region> regions_;
};

}  // namespace freeio::cuda
