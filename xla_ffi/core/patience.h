// How long a wait for peers may last, and when the log reports it.
#pragma once

#include <chrono>

namespace freeio {

using Clock = std::chrono::steady_clock;

// After how many seconds the log reports a wait for the first time. The log reports it again
// whenever the wait has become twice as long. Applies to waits that begin from now on.
void set_patience(double seconds);
double patience_in_seconds();

// The times at which the log reports a wait that begins now, and the time at which the wait ends.
class Patience {
 public:
  explicit Patience(double timeout);

  double timeout() const { return timeout_; }
  Clock::time_point due() const { return due_; }
  bool at_end() const { return due_ >= end_; }
  double waited() const;   // how many seconds the wait has lasted at due()
  void extend();           // moves due() to the next report, or to the end
  void extend_past_end();  // moves due() to the next report, though it may come after the end

 private:
  const double timeout_;
  const Clock::time_point begin_;
  const Clock::time_point end_;
  Clock::time_point due_;
};

}  // namespace freeio
