// One thread looks at everything that waits, when it is time to tell the log of it or to give up.
#pragma once

#include <memory>

#include "core/patience.h"

namespace freeio::cpu {

class Waiting {
 public:
  virtual ~Waiting() = default;
  // Changes in look() only.
  virtual Clock::time_point due() const = 0;
  // Called when it is due, on the one thread, which it must not block. True: look again.
  virtual bool look() = 0;
};

// Looks at `item` when it is due, unless it was removed before.
void watch(const std::shared_ptr<Waiting>& item);
void stop_watching(const std::shared_ptr<Waiting>& item);

}  // namespace freeio::cpu
