// Things that end at a point in time unless they are done before.
#pragma once

#include <chrono>
#include <memory>

namespace freeio::host {

using Clock = std::chrono::steady_clock;

class Expiring {
 public:
  virtual ~Expiring() = default;
  virtual Clock::time_point deadline() const = 0;
  // On a thread that serves all deadlines: must not block.
  virtual void expire() = 0;
};

// Calls expire() when its deadline has passed, unless it was removed before.
void add_deadline(const std::shared_ptr<Expiring>& item);
void remove_deadline(const std::shared_ptr<Expiring>& item);

}  // namespace freeio::host
