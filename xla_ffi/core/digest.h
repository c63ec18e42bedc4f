// A digest of a list of numbers. Equal lists have equal digests.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace freeio {

// FNV-1a over the numbers' bytes.
class Digest {
 public:
  Digest() = default;
  Digest(std::initializer_list<int64_t> numbers) { add(numbers); }
  explicit Digest(const std::vector<int64_t>& numbers) {
    for (const int64_t number : numbers) add({number});
  }

  void add(std::initializer_list<int64_t> numbers) {
    for (const int64_t number : numbers) {
      for (int shift = 0; shift < 64; shift += 8) {
        value_ ^= (static_cast<uint64_t>(number) >> shift) & 0xff;
        value_ *= 0x100000001b3u;
      }
    }
  }

  uint64_t value() const { return value_; }
  uint32_t folded() const { return static_cast<uint32_t>(value_ ^ value_ >> 32); }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

}  // namespace freeio
