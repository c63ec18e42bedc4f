// Things that wait, and are looked at when it is time to say so, or to give up.
#pragma once

#include <chrono>
#include <memory>

namespace freeio::host {

using Clock = std::chrono::steady_clock;

// Seconds after which a wait is told in the log for the first time. It is told again whenever it
// has become twice as long. For waits that begin from now on.
void set_patience(double seconds);
double patience_in_seconds();

// When a wait that begins now is to be told, and when it is to end.
class Patience {
 public:
  explicit Patience(double timeout);

  double timeout() const { return timeout_; }
  Clock::time_point due() const { return due_; }
  bool at_end() const { return due_ >= end_; }
  double waited() const;  // seconds, when it is due
  void extend();          // to the next time at which it is due

 private:
  const double timeout_;
  const Clock::time_point begin_;
  const Clock::time_point end_;
  Clock::time_point due_;
};

class Waiting {
 public:
  virtual ~Waiting() = default;
  // Changes in look() only.
  virtual Clock::time_point due() const = 0;
  // Called when it is due, on a thread that serves all: must not block. True: look again.
  virtual bool look() = 0;
};

// Looks at `item` when it is due, unless it was removed before.
void watch(const std::shared_ptr<Waiting>& item);
void stop_watching(const std::shared_ptr<Waiting>& item);

}  // namespace freeio::host
