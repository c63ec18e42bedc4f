// Twin of xla_ffi/cuda/device/async_copy.cuh: the same names, on the machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace freeio::cuda {

constexpr bool kHasBulkCopies = true;
constexpr int kBulkUnit = 16;

// A copy takes place when a thread first looks for its end, and a random time later.
class CopyBarrier {
 public:
  void begin() { *this = CopyBarrier(); }

  void arrive() {
    emulator::preempt();
    end_phase();
  }

  void copy(void* shared, const void* global, uint32_t bytes) {
    emulator::preempt();
    // What was in the slot before must not be read any more.
    memset(shared, 0xee, bytes);
    to_ = shared;
    from_ = global;
    bytes_ = bytes;
    end_phase();
  }

  bool has_ended(uint32_t parity, emulator::SourceLine where = emulator::SourceLine::here()) const {
    emulator::before_load(&num_ended_, sizeof(num_ended_), where);
    auto* const self = const_cast<CopyBarrier*>(this);
    if (num_ended_ % 2 == parity) return false;
    if (to_ != nullptr) memcpy(self->to_, from_, bytes_);
    self->to_ = nullptr;
    return true;
  }

 private:
  void end_phase() {
    ++num_ended_;
    emulator::stored(&num_ended_);
  }

  uint64_t num_ended_ = 0;
  void* to_ = nullptr;
  const void* from_ = nullptr;
  uint32_t bytes_ = 0;
};

inline void publish_barriers() {}

}  // namespace freeio::cuda
