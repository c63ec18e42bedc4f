#include "cpu/instance_name.h"

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "core/digest.h"
#include "core/patience.h"

namespace freeio::cpu {

class ModuleInstances {
 public:
  std::atomic<bool> is_complete{false};
  std::map<uint64_t, int64_t> next;  // ordinal, by attributes
  Clock::time_point last;            // when an instance was added
};

namespace {

struct Instances {
  std::mutex mutex;
  std::map<std::thread::id, std::shared_ptr<ModuleInstances>> of_thread;  // the last ones
  std::set<uint64_t> attributes;                                          // of all
};

// Lives until the process ends, as threads that compile may.
Instances& instances() {
  static Instances* const instance = std::make_unique<Instances>().release();
  return *instance;
}

}  // namespace

NamedInstance name_instance(const std::vector<int64_t>& module, const std::vector<int64_t>& program,
                            const std::vector<int64_t>& attributes) {
  const uint64_t key = Digest(attributes).value();
  std::lock_guard lock(instances().mutex);
  instances().attributes.insert(key);
  std::shared_ptr<ModuleInstances>& module_instances =
      instances().of_thread[std::this_thread::get_id()];
  const bool is_first = module_instances == nullptr || module_instances->is_complete;
  if (is_first) module_instances = std::make_shared<ModuleInstances>();
  module_instances->last = Clock::now();
  return {{Digest(module).value(), Digest(program).value(), key, module_instances->next[key]++},
          module_instances,
          is_first};
}

void module_is_complete(ModuleInstances& module_instances) { module_instances.is_complete = true; }

void compilation_ended(double seconds) {
  const Clock::time_point begin = Clock::now() - std::chrono::duration_cast<Clock::duration>(
                                                     std::chrono::duration<double>(seconds));
  std::lock_guard lock(instances().mutex);
  auto& of_thread = instances().of_thread;
  auto oldest = of_thread.end();
  for (auto item = of_thread.begin(); item != of_thread.end();) {
    if (item->second->is_complete || item->second->last < begin) {
      // XLA does not pause that long while it makes the instances of a module.
      item = of_thread.erase(item);
    } else {
      if (oldest == of_thread.end() || item->second->last < oldest->second->last) oldest = item;
      ++item;
    }
  }
  // XLA makes the instances long before the end of a compilation. So if several threads compile,
  // the compilation that ended is on the thread that has made no instance for the longest time.
  if (oldest != of_thread.end()) of_thread.erase(oldest);
}

bool has_instance(uint64_t attributes) {
  std::lock_guard lock(instances().mutex);
  return instances().attributes.count(attributes) != 0;
}

}  // namespace freeio::cpu
