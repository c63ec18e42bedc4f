// How long a wait for peers may last, and when the log tells of it.
#pragma once

#include <chrono>

namespace freeio {

using Clock = std::chrono::steady_clock;

// Seconds after which the log tells of a wait for the first time. It tells again whenever the wait
// has become twice as long. Holds for waits that begin from now on.
void set_patience(double seconds);
double patience_in_seconds();

// When the log is to tell of a wait that begins now, and when the wait is to end.
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

}  // namespace freeio
