#include "hosts/sources.h"

#include <string>

#include "cuda/current_device.h"

namespace freeio::cuda {

Status Sources::expose(const void* pointer) {
  constexpr size_t kMostRegions = 64;  // XLA's pool grows by doubling
  RelaxedCapture relaxed;              // XLA may be capturing the launch that this is for
  uint64_t allocation_id = 0;
  Status status = allocation_id_of(pointer, allocation_id);
  if (!status.ok()) return status;
  const auto address = reinterpret_cast<uint64_t>(pointer);
  std::lock_guard lock(mutex_);
  for (auto region = regions_.begin(); region != regions_.end(); ++region) {
    if (address - region->range.base >= region->range.bytes) continue;
    if (region->allocation_id == allocation_id) return {};
    // XLA has freed that region, and got another one at the same addresses.
    hide_region(reinterpret_cast<void*>(region->range.base));
    regions_.erase(region);
    break;
  }
  if (regions_.size() == kMostRegions) {
    return {Code::kInternal,
            "freeio_jax: XLA's memory on this GPU lies in more than " +
                std::to_string(kMostRegions) +
                " allocations, which is more than the network between hosts is told of. Let XLA "
                "take its memory at once: XLA_PYTHON_CLIENT_PREALLOCATE=true, and no "
                "XLA_PYTHON_CLIENT_ALLOCATOR."};
  }
  Region region = {{}, allocation_id};
  status = range_of(pointer, region.range);
  if (status.ok()) {
    status = expose_region(reinterpret_cast<void*>(region.range.base), region.range.bytes);
  }
  if (status.ok()) regions_.push_back(region);
  return status;
}

}  // namespace freeio::cuda
