// Twin of xla_ffi/hosts/device/wire.cuh: the same names, on the machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "machine.h"

namespace freeio::cuda {

enum class Signal { kHeader, kParcel, kAnswer, kCredit, kGaveUp };

struct Words {
  void* symmetric;
  const void* from;
  int64_t bytes;
};

struct Wire {
  template <typename T>
  static T* direct(T* symmetric, int pe) {
    return static_cast<T*>(emulator::linked(symmetric, pe));
  }

  static void store(void* to, const void* from, size_t bytes,
                    emulator::SourceLine where = emulator::SourceLine::here()) {
    emulator::gather(emulator::Together::kNothing, 0, emulator::kAllLanes, where);
    if (emulator::lane() == 0) std::memcpy(to, from, bytes);
  }

  static void fence_for_network() {}

  template <int kCount>
  static void put_all(const Words (&all)[kCount], int pe,
                      emulator::SourceLine where = emulator::SourceLine::here()) {
    for (const Words& it : all)
      put(it.symmetric, it.from, static_cast<size_t>(it.bytes), pe, where);
  }

  static void put(void* symmetric, const void* from, size_t bytes, int pe,
                  emulator::SourceLine where = emulator::SourceLine::here()) {
    emulator::gather(emulator::Together::kNothing, 0, emulator::kAllLanes, where);
    if (emulator::lane() == 0) emulator::network_put(symmetric, from, bytes, pe);
  }

  static void fence() { emulator::network_fence(); }

  static void signal(Signal kind, uint64_t* symmetric, uint64_t value, int pe) {
    emulator::network_signal(static_cast<int>(kind), symmetric, value, pe);
  }

  static bool has(Signal kind, const uint64_t* word, uint64_t value,
                  emulator::SourceLine where = emulator::SourceLine::here()) {
    emulator::before_load(word, sizeof(*word), where);
    if (emulator::is_unawaited(static_cast<int>(kind))) return true;
    return __atomic_load_n(word, __ATOMIC_ACQUIRE) == value;
  }
};

}  // namespace freeio::cuda
