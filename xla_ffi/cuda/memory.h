// Device memory that processes share: physical allocations, their export as file descriptors, and
// mappings of them.
//
// CUDA's runtime has no functions for this. Those of the driver are looked up at their first use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/status.h"
#include "pod/unique_fd.h"

namespace freeio::cuda {

// Holds a physical allocation of device memory. The memory is freed when no process holds it or has
// it mapped any more.
class Allocation {
 public:
  Allocation() = default;
  Allocation(Allocation&& other) noexcept;
  Allocation& operator=(Allocation&& other) noexcept;
  ~Allocation();

  uint64_t handle() const { return handle_; }

  // Allocates memory on a GPU that other processes can map. Rounds `bytes` up to the driver's
  // granularity.
  static Status create(int ordinal, size_t& bytes, Allocation& made);
  // The allocation that another process has exported as `file`.
  static Status import(const pod::UniqueFd& file, Allocation& made);
  // The allocation that is mapped at `pointer`. An error if that memory cannot be shared.
  static Status behind(const void* pointer, Allocation& found);

  // Makes a file descriptor for it, which another process can import.
  Status export_to(pod::UniqueFd& file) const;

 private:
  uint64_t handle_ = 0;
  bool is_held_ = false;
};

// A range of this process's addresses where an allocation is mapped.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  void* base() const { return reinterpret_cast<void*>(base_); }
  size_t bytes() const { return bytes_; }

  // Maps all of `allocation`, so that the GPUs `ordinals` can read and write it. No kernel may use
  // the mapping any more when it is destroyed.
  static Status make(const Allocation& allocation, size_t bytes, const std::vector<int>& ordinals,
                     Mapping& made);

 private:
  uint64_t base_ = 0;
  size_t bytes_ = 0;
  bool is_mapped_ = false;
};

// The addresses here of the allocation that a pointer lies in.
struct AddressRange {
  uint64_t base = 0;
  size_t bytes = 0;
};
Status range_of(const void* pointer, AddressRange& range);

// The driver's number for the allocation that a pointer lies in. A later allocation at the same
// addresses has another number.
Status allocation_id_of(const void* pointer, uint64_t& allocation_id);

}  // namespace freeio::cuda
