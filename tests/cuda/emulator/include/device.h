// The built-in names of the CUDA compiler, for a C++ compiler. Included before each kernel source.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One copy, which the machine fills with the values of the running CTA: shared_section.h.
#define __shared__ static __attribute__((used))

#define threadIdx (::emulator::thread_index)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline uint64_t min(uint64_t a, uint64_t b) { return b < a ? b : a; }
inline uint64_t max(uint64_t a, uint64_t b) { return a < b ? b : a; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline void __syncthreads(emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::barrier(where);
}

inline int __syncthreads_or(int value, emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::barrier(where, value != 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulator::SourceLine where = emulator::SourceLine::here()) {
  emulator::gather(emulator::Together::kNothing, 0, mask, where);
}

namespace emulator {

constexpr uint32_t kAllLanes = 0xffffffffu;

inline int lane() { return static_cast<int>(thread_index.x) % kLanes; }

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The value of lane `from`; the lane's own value if there is no such lane.
template <typename T>
T shuffle(unsigned mask, T value, int from, SourceLine where) {
  const uint64_t* values = gather(Together::kShuffle, to_bits(value), mask, where);
  return from < 0 || from >= kLanes ? value : from_bits<T>(values[from]);
}

template <typename T, typename F>
T reduce(unsigned mask, T value, SourceLine where, const F& f) {
  const uint64_t* values = gather(Together::kReduce, to_bits(value), mask, where);
  T all = from_bits<T>(values[0]);
  for (int i = 1; i < kLanes; ++i) all = f(all, from_bits<T>(values[i]));
  return all;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int from,
              emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::shuffle(mask, value, from % emulator::kLanes, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance,
                 emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::shuffle(mask, value, emulator::lane() - distance, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance,
                   emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::shuffle(mask, value, emulator::lane() + distance, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes,
                  emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::shuffle(mask, value, emulator::lane() ^ lanes, where);
}

inline unsigned __ballot_sync(unsigned mask, bool value,
                              emulator::SourceLine where = emulator::SourceLine::here()) {
  const uint64_t* values = emulator::gather(emulator::Together::kBallot, value, mask, where);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kLanes; ++i) bits |= static_cast<unsigned>(values[i] != 0) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool value,
                       emulator::SourceLine where = emulator::SourceLine::here()) {
  return __ballot_sync(mask, value, where) != 0;
}
inline bool __all_sync(unsigned mask, bool value,
                       emulator::SourceLine where = emulator::SourceLine::here()) {
  return __ballot_sync(mask, value, where) == emulator::kAllLanes;
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value,
                          emulator::SourceLine where = emulator::SourceLine::here()) {
  const uint64_t own = emulator::to_bits(value);
  const uint64_t* values = emulator::gather(emulator::Together::kMatch, own, mask, where);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kLanes; ++i) bits |= static_cast<unsigned>(values[i] == own) << i;
  return bits;
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value,
                    emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::reduce(mask, value, where, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value,
                    emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::reduce(mask, value, where, [](T a, T b) { return max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value,
                    emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::reduce(mask, value, where, [](T a, T b) { return min(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::reduce(mask, value, where, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  emulator::SourceLine where = emulator::SourceLine::here()) {
  return emulator::reduce(mask, value, where, [](unsigned a, unsigned b) { return a & b; });
}

template <typename T>
T atomicAdd(T* address, T amount) {
  emulator::preempt();
  const T before = *address;
  *address = before + amount;
  emulator::stored(address);
  return before;
}
template <typename T>
T atomicExch(T* address, T value) {
  emulator::preempt();
  const T before = *address;
  *address = value;
  emulator::stored(address);
  return before;
}
