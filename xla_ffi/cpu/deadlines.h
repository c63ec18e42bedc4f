// One thread that looks at every wait when it is time to report it in the log, or to give up.
#pragma once

#include <memory>

#include "core/patience.h"

namespace freeio::cpu {

class Waiting {
 public:
  virtual ~Waiting() = default;
  // When to look. Only look() may change this.
  virtual Clock::time_point due() const = 0;
  // Called at due() on the one thread, which it must not block. True: call it again at the new
  // due().
  virtual bool look() = 0;
};

// watch() has the thread look at `item` when it is due. stop_watching() ends that.
void watch(const std::shared_ptr<Waiting>& item);
void stop_watching(const std::shared_ptr<Waiting>& item);

}  // namespace freeio::cpu
