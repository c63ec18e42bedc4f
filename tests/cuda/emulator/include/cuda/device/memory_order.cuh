// Twin of xla_ffi/cuda/device/memory_order.cuh: the same names, on the machine.
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
                                    emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::before_load(word, sizeof(*word), where);
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

inline void store_relaxed_system(uint32_t* word, uint32_t value) {
  emulator::preempt();
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
  emulator::stored(word);
}

inline void store_release_block(uint64_t* word, uint64_t value) {
  emulator::preempt();
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
  emulator::stored(word);
}

inline uint64_t load_acquire_block(const uint64_t* word,
                                   emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::before_load(word, sizeof(*word), where);
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

inline void store_word(uint64_t* word, uint64_t value) { emulator::send_word(word, value); }

inline uint64_t load_word(const uint64_t* word,
                          emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::before_load(word, sizeof(*word), where);
  return __atomic_load_n(word, __ATOMIC_RELAXED);
}

struct WordPair {
  uint64_t first;
  uint64_t second;
};
inline WordPair load_word_pair(const uint64_t* words,
                               emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::before_load(words, sizeof(WordPair), where);
  return {__atomic_load_n(&words[0], __ATOMIC_RELAXED),
          __atomic_load_n(&words[1], __ATOMIC_RELAXED)};
}

// Whole warp. The line is sent as one when all its lanes are here.
inline void store_line(uint4* part, const uint4& value,
                       emulator::SourceLine where = emulator::SourceLine::here()) {
  constexpr int kLanesOfLine = 8;
  uint64_t line[emulator::kLineWords];
  uint64_t halves[emulator::kLineWords / kLanesOfLine];
  memcpy(halves, &value, sizeof(halves));
  const int first = emulator::lane() / kLanesOfLine * kLanesOfLine;
  for (int half = 0; half < 2; ++half) {
    const uint64_t* all =
        emulator::gather(emulator::Together::kShuffle, halves[half], emulator::kAllLanes, where);
    for (int i = 0; i < kLanesOfLine; ++i) line[2 * i + half] = all[first + i];
  }
  if (emulator::lane() == first) emulator::send_line(part, line);
}

// The lanes with the flags load first. If a flag has arrived, the other parts of its line have,
// too.
inline uint4 load_line(const uint4* part,
                       emulator::SourceLine where = emulator::SourceLine::here()) {
  constexpr int kLanesOfLine = 8;
  const bool flags = emulator::lane() % kLanesOfLine == kLanesOfLine - 1;
  uint4 value;
  if (flags) {
    const uint32_t flag = __atomic_load_n(&part->z, __ATOMIC_ACQUIRE);
    value = *part;
    value.z = flag;
  }
  emulator::gather(emulator::Together::kNothing, 0, emulator::kAllLanes, where);
  if (!flags) value = *part;
  emulator::gather(emulator::Together::kNothing, 0, emulator::kAllLanes, where);
  return value;
}

inline uint64_t load_acquire_word(const uint64_t* word,
                                  emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::before_load(word, sizeof(*word), where);
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

inline void fence_system() {
  emulator::fence();
  __atomic_thread_fence(__ATOMIC_ACQ_REL);
}

inline uint64_t add_acquire_release_block(uint64_t* counter, uint64_t amount) {
  emulator::preempt();
  const uint64_t before = __atomic_fetch_add(counter, amount, __ATOMIC_ACQ_REL);
  emulator::stored(counter);
  return before;
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
                                    emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::before_load(word, sizeof(*word), where);
  return __atomic_load_n(word, __ATOMIC_RELAXED);
}

// Plain stores arrive at once on this machine.
template <uint32_t>
void sleep_microseconds() {}

inline uint64_t nanoseconds() { return emulator::nanoseconds(); }

}  // namespace freeio::cuda
