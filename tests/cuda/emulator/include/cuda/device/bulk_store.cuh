// Twin of xla_ffi/cuda/device/bulk_store.cuh: the same names, on the machine.
#pragma once

#include <cstdint>

#include "machine.h"

namespace freeio::cuda {

constexpr bool kHasBulkStores = true;

inline void publish_to_bulk_stores() {}

inline void store_bulk(void* global, const void* shared, uint32_t bytes) {
  emulator::preempt();
  emulator::start_bulk_store(global, shared, bytes);
}

inline void wait_for_bulk_reads() { emulator::wait_for_bulk_reads(); }

inline void wait_for_bulk_stores() {
  emulator::preempt();
  emulator::wait_for_bulk_stores();
}

}  // namespace freeio::cuda
