// Things to do once a lock is released: they would take it again, or take long.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace freeio::cpu {

// Declared before the guard of the lock, so that it is destroyed after it. Then it does everything,
// in order, also where an exception has ended the block.
class AfterUnlock {
 public:
  AfterUnlock() = default;
  AfterUnlock(const AfterUnlock&) = delete;
  AfterUnlock& operator=(const AfterUnlock&) = delete;
  ~AfterUnlock() {
    for (const auto& action : actions_) action();
  }

  void add(std::function<void()> action) { actions_.push_back(std::move(action)); }

 private:
  std::vector<std::function<void()>> actions_;
};

}  // namespace freeio::cpu
