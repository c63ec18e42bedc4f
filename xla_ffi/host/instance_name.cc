#include "host/instance_name.h"

#include <map>
#include <mutex>

namespace freeio::host {
namespace {

struct Ordinals {
  std::mutex mutex;
  std::map<uint64_t, int64_t> next;  // in this module, by attributes
};

Ordinals& ordinals() {
  static Ordinals instance;
  return instance;
}

// FNV-1a over the numbers' bytes.
uint64_t hash(const std::vector<int64_t>& numbers) {
  uint64_t result = 0xcbf29ce484222325u;
  for (int64_t number : numbers) {
    for (int shift = 0; shift < 64; shift += 8) {
      result ^= (static_cast<uint64_t>(number) >> shift) & 0xff;
      result *= 0x100000001b3u;
    }
  }
  return result;
}

}  // namespace

void begin_module() {
  std::lock_guard lock(ordinals().mutex);
  ordinals().next.clear();
}

InstanceName name_instance(const std::vector<int64_t>& attributes) {
  const uint64_t key = hash(attributes);
  std::lock_guard lock(ordinals().mutex);
  return {key, ordinals().next[key]++};
}

}  // namespace freeio::host
