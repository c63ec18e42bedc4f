#include "host/instance_name.h"

#include <map>
#include <mutex>

#include "core/digest.h"

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

}  // namespace

void begin_module() {
  std::lock_guard lock(ordinals().mutex);
  ordinals().next.clear();
}

InstanceName name_instance(const std::vector<int64_t>& attributes) {
  const uint64_t key = Digest(attributes).value();
  std::lock_guard lock(ordinals().mutex);
  return {key, ordinals().next[key]++};
}

}  // namespace freeio::host
