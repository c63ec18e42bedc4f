#include "core/patience.h"

#include <algorithm>
#include <atomic>

namespace freeio {
namespace {

std::atomic<double> patience_seconds{30.0};

Clock::duration seconds(double count) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

}  // namespace

void set_patience(double seconds) { patience_seconds = seconds; }
double patience_in_seconds() { return patience_seconds; }

Patience::Patience(double timeout)
    : timeout_(timeout),
      begin_(Clock::now()),
      end_(begin_ + seconds(timeout)),
      due_(std::min(end_, begin_ + seconds(patience_seconds))) {}

double Patience::waited() const { return std::chrono::duration<double>(due_ - begin_).count(); }

void Patience::extend() { due_ = std::min(end_, begin_ + 2 * (due_ - begin_)); }

void Patience::extend_past_end() { due_ = begin_ + 2 * (due_ - begin_); }

}  // namespace freeio
