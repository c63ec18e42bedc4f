// What this process knows of the runs of one program, as one group of its ranks sees them.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <utility>

#include "core/status.h"

namespace freeio::cpu {

struct Run {
  bool has_begun_here = false;
  std::map<std::pair<uint64_t, int64_t>, int64_t> calls;  // made here, by attributes and ordinal
  // Why this process or a peer has given the run up. OK: none has. After a failure the run has no
  // exchanges.
  Status failure;
};

// Not locked by itself: its owner's lock guards it.
class GroupRuns {
 public:
  // The number of the run with XLA's id `xla_run`. The first call for a run gives it the next
  // number.
  int64_t number_of(int64_t xla_run) {
    const auto [number, is_new] = numbers_.try_emplace(xla_run, next_);
    if (is_new) ++next_;
    return number->second;
  }

  Run& at(int64_t number) { return runs_[number]; }

  // Null: nothing is known of the run.
  const Run* find(int64_t number) const {
    const auto found = runs_.find(number);
    return found != runs_.end() ? &found->second : nullptr;
  }

  // Whether the run and all earlier ones are over in all processes.
  bool is_over(int64_t number) const { return number < oldest_; }

  // Drops what is known of a run if this process has come to no run of the program.
  void forget_unless_ours(int64_t number) {
    if (next_ == 0) runs_.erase(number);
  }

  // An exchange of the run is complete in all its processes, so all its ranks have come to the run.
  // XLA has at most 32 runs of a device in flight, so runs before those are over, and no message
  // about them will come. Returns the runs that are over now and were not before: the number of the
  // first, and the number after the last.
  std::pair<int64_t, int64_t> complete(int64_t number) {
    constexpr int64_t kInFlight = 32;
    const int64_t first = oldest_;
    if (number - kInFlight <= oldest_) return {first, first};
    oldest_ = number - kInFlight;
    runs_.erase(runs_.begin(), runs_.lower_bound(oldest_));
    for (auto item = numbers_.begin(); item != numbers_.end();) {
      item = is_over(item->second) ? numbers_.erase(item) : std::next(item);
    }
    return {first, oldest_};
  }

 private:
  std::map<int64_t, int64_t> numbers_;  // by XLA's id
  std::map<int64_t, Run> runs_;         // by number
  int64_t next_ = 0;
  int64_t oldest_ = 0;
};

}  // namespace freeio::cpu
