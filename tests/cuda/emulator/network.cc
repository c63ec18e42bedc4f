#include "network.h"

#include <string.h>

namespace emulator {

bool Network::put(const Sender& sender, void* symmetric, const void* from, size_t bytes, int gpu,
                  Random& random) {
  bytes_ += bytes;
  auto* const to = static_cast<std::byte*>(symmetric);
  const auto* begin = static_cast<const std::byte*>(from);
  // In two parts, which may arrive apart.
  const size_t first = bytes > 0 ? random.below(static_cast<uint32_t>(bytes)) : 0;
  return send({sender, gpu, to, begin, first, 0}) &&
         send({sender, gpu, to + first, begin + first, bytes - first, 0});
}

bool Network::signal(const Sender& sender, int kind, uint64_t* symmetric, uint64_t value, int gpu) {
  if ((faults_.lost_kinds >> kind & 1) != 0) return true;
  return send(
      {sender, gpu, reinterpret_cast<std::byte*>(symmetric), nullptr, sizeof(value), value});
}

// Sends what goes to the place `to` of the sender's heap.
bool Network::send(Thing thing) {
  const Heap& own = heaps_[thing.sender.gpu];
  const Heap& other = heaps_[thing.gpu];
  const auto at = static_cast<size_t>(thing.to - own.base);
  if (own.base == nullptr || thing.to < own.base || at + thing.bytes > other.bytes) return false;
  thing.to = other.base + at;
  things_.push_back(thing);
  ++on_the_way_[{thing.sender.warp, thing.gpu}][thing.sender.fences];
  return true;
}

bool Network::may_arrive(const Thing& thing) const {
  const auto& by_fences = on_the_way_.at({thing.sender.warp, thing.gpu});
  return by_fences.begin()->first == thing.sender.fences;
}

void Network::take_out(size_t index) {
  const Thing& thing = things_[index];
  const auto pair = on_the_way_.find({thing.sender.warp, thing.gpu});
  const auto count = pair->second.find(thing.sender.fences);
  if (--count->second == 0) pair->second.erase(count);
  if (pair->second.empty()) on_the_way_.erase(pair);
  things_[index] = things_.back();
  things_.pop_back();
}

bool Network::deliver_one(Random& random, bool slow_too) {
  if (things_.empty()) return false;
  const size_t first = random.below(static_cast<uint32_t>(things_.size()));
  for (size_t i = 0; i < things_.size(); ++i) {
    const size_t index = (first + i) % things_.size();
    const Thing thing = things_[index];
    const bool is_slow = (slow_gpus_ >> thing.gpu % 32 & 1) != 0;
    if ((is_slow && !slow_too) || !may_arrive(thing)) continue;
    take_out(index);
    arrive(thing);
    return true;
  }
  return false;
}

void Network::deliver_some(Random& random) {
  for (size_t i = 0; i < 1 + things_.size() / 16; ++i) {
    if (!deliver_one(random, false)) return;
  }
}

void Network::deliver_all() {
  for (const Thing& thing : things_) arrive(thing);
  things_.clear();
  on_the_way_.clear();
}

void Network::arrive(const Thing& thing) const {
  if (thing.from != nullptr) {
    memcpy(thing.to, thing.from, thing.bytes);
    return;
  }
  auto* const word = reinterpret_cast<uint64_t*>(thing.to);
  __atomic_store_n(word, thing.value, __ATOMIC_RELEASE);
  stored_(word);
}

}  // namespace emulator
