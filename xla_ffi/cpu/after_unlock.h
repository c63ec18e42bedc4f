// Actions that must wait until a lock is released, because they take that lock or take long.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace freeio::cpu {

// Runs its actions, in order, when it is destroyed. Declare it before the guard of the lock, so
// that it is destroyed after the guard, also if an exception ends the block.
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
