#include "cpu/instance_name.h"

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "core/digest.h"
#include "core/patience.h"

namespace freeio::cpu {

class InstanceBlock {
 public:
  std::atomic<bool> closed{false};
  std::map<uint64_t, int64_t> next;  // ordinal, by attributes
  Clock::time_point last;            // when an instance was added
};

namespace {

struct Instances {
  std::mutex mutex;
  std::map<std::thread::id, std::shared_ptr<InstanceBlock>> blocks;  // that may be open
  std::set<uint64_t> attributes;                                     // of all
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
  std::shared_ptr<InstanceBlock>& block = instances().blocks[std::this_thread::get_id()];
  const bool is_first = block == nullptr || block->closed;
  if (is_first) block = std::make_shared<InstanceBlock>();
  block->last = Clock::now();
  return {
      {Digest(module).value(), Digest(program).value(), key, block->next[key]++}, block, is_first};
}

void module_is_complete(InstanceBlock& block) { block.closed = true; }

void compilation_ended(double seconds) {
  const Clock::time_point begin = Clock::now() - std::chrono::duration_cast<Clock::duration>(
                                                     std::chrono::duration<double>(seconds));
  std::lock_guard lock(instances().mutex);
  auto& blocks = instances().blocks;
  auto oldest = blocks.end();
  for (auto item = blocks.begin(); item != blocks.end();) {
    if (item->second->closed || item->second->last < begin) {
      // Whatever module it is of, XLA does not pause that long while it makes a module's instances.
      item = blocks.erase(item);
    } else {
      if (oldest == blocks.end() || item->second->last < oldest->second->last) oldest = item;
      ++item;
    }
  }
  // Where several threads compile, the compilation that ended is that of the thread which made no
  // instance for the longest time: XLA makes the instances long before the end.
  if (oldest != blocks.end()) blocks.erase(oldest);
}

bool has_instance(uint64_t attributes) {
  std::lock_guard lock(instances().mutex);
  return instances().attributes.count(attributes) != 0;
}

}  // namespace freeio::cpu
