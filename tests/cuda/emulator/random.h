// The numbers by which the machine decides. The same seed gives the same numbers everywhere.
#pragma once

#include <cstdint>

namespace emulator {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x853c49e6748fea9bu) {
    for (int i = 0; i < 8; ++i) next();
  }
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  uint32_t below(uint32_t bound) {
    return static_cast<uint32_t>(static_cast<uint64_t>(next()) * bound >> 32);
  }
  bool one_in(uint32_t n) { return below(n) == 0; }
  // Some bit of a mask that is not empty.
  int bit_of(uint32_t mask) {
    const uint32_t turn = next() % 32;
    const uint32_t turned = mask >> turn | mask << ((32 - turn) % 32);
    return static_cast<int>((static_cast<uint32_t>(__builtin_ctz(turned)) + turn) % 32);
  }

 private:
  uint64_t state_;
};

}  // namespace emulator
