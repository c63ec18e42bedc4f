// Device memory that processes share: physical allocations, their export as file descriptors, and
// mappings of them.
//
// CUDA's runtime has no such functions; the driver's are looked up when first needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/status.h"
#include "pod/unique_fd.h"

namespace freeio::cuda {

// Holds a physical allocation. It lives as long as somebody, in any process, holds it or has it
// mapped.
class Allocation {
 public:
  Allocation() = default;
  Allocation(Allocation&& other) noexcept;
  Allocation& operator=(Allocation&& other) noexcept;
  ~Allocation();

  uint64_t handle() const { return handle_; }

  // New memory on a GPU, that other processes can map. `bytes` is rounded up to what the driver
  // gives out.
  static Status create(int ordinal, size_t& bytes, Allocation& made);
  // What a peer has exported.
  static Status import(const pod::UniqueFd& file, Allocation& made);
  // What is mapped at `pointer`. An error where that memory cannot be shared.
  static Status behind(const void* pointer, Allocation& found);

  Status export_to(pod::UniqueFd& file) const;

 private:
  uint64_t handle_ = 0;
  bool held_ = false;
};

// An allocation in this process's address space.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  void* base() const { return reinterpret_cast<void*>(base_); }
  size_t bytes() const { return bytes_; }

  // Maps all of `allocation` for reading and writing by the GPUs `ordinals`. No kernel may use the
  // mapping when it is destroyed.
  static Status make(const Allocation& allocation, size_t bytes, const std::vector<int>& ordinals,
                     Mapping& made);

 private:
  uint64_t base_ = 0;
  size_t bytes_ = 0;
  bool mapped_ = false;
};

// The allocation that a pointer lies in, as mapped here.
struct AddressRange {
  uint64_t base = 0;
  size_t bytes = 0;
};
Status range_of(const void* pointer, AddressRange& range);

// A number that no other allocation of this process ever has.
Status identity_of(const void* pointer, uint64_t& identity);

}  // namespace freeio::cuda
