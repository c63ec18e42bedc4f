// The network between hosts: what GPUs have put and signalled, until it arrives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "machine.h"
#include "random.h"

namespace emulator {

// The warp that puts or signals something.
struct Sender {
  int gpu;
  uint64_t warp;    // never the number of another warp
  uint32_t fences;  // that it has made so far
};

class Network {
 public:
  // `stored` is called with the address of each signal that has arrived.
  explicit Network(std::function<void(const void*)> stored) : stored_(std::move(stored)) {}

  void set_heap(int gpu, void* base, size_t bytes) {
    heaps_[gpu] = {static_cast<std::byte*>(base), bytes};
  }

  void set_linked(bool are_linked) { are_linked_ = are_linked; }
  // As linked(), for a thread of the GPU `from`.
  void* linked(const void* symmetric, int from, int gpu) const {
    if (!are_linked_) return nullptr;
    return heaps_[gpu].base + (static_cast<const std::byte*>(symmetric) - heaps_[from].base);
  }

  void set_faults(const NetworkFaults& faults) { faults_ = faults; }
  const NetworkFaults& faults() const { return faults_; }

  // Bytes that have been put so far.
  uint64_t bytes() const { return bytes_; }

  // As network_put() and network_signal(). False: the place is not in the symmetric heap.
  bool put(const Sender& sender, void* symmetric, const void* from, size_t bytes, int gpu,
           Random& random);
  bool signal(const Sender& sender, int kind, uint64_t* symmetric, uint64_t value, int gpu);

  // From now on what goes to some GPUs arrives when no thread can go on.
  void draw_slow_gpus(Random& random) { slow_gpus_ = random.next() & random.next(); }

  void deliver_some(Random& random);
  // For when no thread can go on. False: there was nothing.
  bool deliver_late(Random& random) { return deliver_one(random, true); }
  void deliver_all();

 private:
  struct Heap {
    std::byte* base = nullptr;
    size_t bytes = 0;
  };

  // A put or a signal.
  struct Thing {
    Sender sender;
    int gpu;  // to which it goes
    std::byte* to;
    const void* from;  // null: a signal
    size_t bytes;
    uint64_t value;
  };

  bool send(Thing thing);
  bool may_arrive(const Thing& thing) const;
  void take_out(size_t index);
  bool deliver_one(Random& random, bool slow_too);
  void arrive(const Thing& thing) const;

  const std::function<void(const void*)> stored_;
  Heap heaps_[kMaxGpus];
  NetworkFaults faults_;
  bool are_linked_ = false;
  uint64_t bytes_ = 0;
  uint32_t slow_gpus_ = 0;
  std::vector<Thing> things_;
  // Of each warp and the GPU to which it has sent something: how many things are on their way, by
  // the number of fences before them. None has no entry.
  std::map<std::pair<uint64_t, int>, std::map<uint32_t, int>> on_the_way_;
};

}  // namespace emulator
