// Twin of xla_ffi/cuda/memory_order.cuh: the same names, on the machine.
#pragma once

#include <cstdint>

#include "machine.h"

namespace freeio::cuda {

inline void store_release_system(uint32_t* word, uint32_t value) {
  emulator::fence();
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
  emulator::stored(word);
}

inline uint32_t load_acquire_system(const uint32_t* word,
                                    emulator::Place place = emulator::Place::here()) {
  emulator::before_load(word, sizeof(*word), place);
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

inline void store_word(uint64_t* word, uint64_t value) { emulator::send_word(word, value); }

inline uint64_t load_word(const uint64_t* word, emulator::Place place = emulator::Place::here()) {
  emulator::before_load(word, sizeof(*word), place);
  return __atomic_load_n(word, __ATOMIC_RELAXED);
}

inline uint64_t load_acquire_word(const uint64_t* word,
                                  emulator::Place place = emulator::Place::here()) {
  emulator::before_load(word, sizeof(*word), place);
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

inline void fence_system() {
  emulator::fence();
  __atomic_thread_fence(__ATOMIC_ACQ_REL);
}

inline uint32_t add_acquire_release_device(uint32_t* counter, uint32_t amount) {
  emulator::fence();
  const uint32_t before = __atomic_fetch_add(counter, amount, __ATOMIC_ACQ_REL);
  emulator::stored(counter);
  return before;
}

inline void add_release_system(uint32_t* counter, uint32_t amount) {
  emulator::fence();
  __atomic_fetch_add(counter, amount, __ATOMIC_RELEASE);
  emulator::stored(counter);
}

inline void add_relaxed_system(uint32_t* counter, uint32_t amount) {
  emulator::preempt();
  __atomic_fetch_add(counter, amount, __ATOMIC_RELAXED);
  emulator::stored(counter);
}

inline void count_around_device(uint32_t* counter, uint32_t last) {
  emulator::preempt();
  __atomic_store_n(counter, *counter >= last ? 0 : *counter + 1, __ATOMIC_RELAXED);
  emulator::stored(counter);
}

inline uint32_t load_relaxed_device(const uint32_t* word,
                                    emulator::Place place = emulator::Place::here()) {
  emulator::before_load(word, sizeof(*word), place);
  return __atomic_load_n(word, __ATOMIC_RELAXED);
}

// What was stored is there at once on the machine, words aside.
template <uint32_t>
void sleep_microseconds() {}

inline uint64_t nanoseconds() { return emulator::nanoseconds(); }

}  // namespace freeio::cuda
