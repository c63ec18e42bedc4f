// The host side of NVSHMEM, which nvshmem4py has loaded and started in this process before.
//
// This module does not link with NVSHMEM's library, so it can be imported where there is none.
#pragma once

#include <cstddef>
#include <string>

#include "core/status.h"
#include "cuda/kernels.h"

namespace freeio::cuda {

class Nvshmem {
 public:
  // Finds the functions in the library that this process has loaded.
  static Status find(Nvshmem& found);

  // An error if NVSHMEM has not started. nvshmem4py does not always notice that, and NVSHMEM's next
  // call would end the process.
  Status check_started() const;

  // Memory in the symmetric heap. Every PE must call these two, with equal arguments. They wait for
  // the other PEs, without a bound.
  Status allocate(size_t alignment, size_t bytes, void*& memory) const;
  void free(void* memory) const { free_(memory); }

  // Where this process's GPU sees another PE's symmetric memory; null: only the network reaches it.
  void* address_on(const void* symmetric, int pe) const { return address_(symmetric, pe); }

  // Lets the network read this memory, which is not in the symmetric heap.
  Status expose(void* memory, size_t bytes) const;
  // The counterpart. The memory may be gone.
  void hide(void* memory) const { hide_(memory); }

  // Puts bytes to a PE's symmetric memory, and waits until they are there, without a bound.
  void put(void* symmetric, const void* from, size_t bytes, int pe) const {
    put_(symmetric, from, bytes, pe);
    quiet_();
  }

  // Tells the module that has the kernel about the PEs and their symmetric memory. To be called
  // after allocate(), on the thread's GPU.
  Status bind(const Kernel& kernel) const;

 private:
  int (*status_)() = nullptr;
  void* (*allocate_)(size_t alignment, size_t bytes) = nullptr;
  void (*free_)(void*) = nullptr;
  void* (*address_)(const void*, int) = nullptr;
  int (*expose_)(void*, size_t) = nullptr;
  int (*hide_)(void*) = nullptr;
  void (*put_)(void*, const void*, size_t, int) = nullptr;
  void (*quiet_)() = nullptr;
  int (*bind_)(void* cu_module) = nullptr;
};

// The version of NVSHMEM's device library in this module, as "3.4.5".
std::string nvshmem_built_with();

}  // namespace freeio::cuda
