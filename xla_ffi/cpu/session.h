// One exchange of one group, while it collects the ranks that take part.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/layout.h"
#include "core/status.h"
#include "cpu/deadlines.h"
#include "cpu/operands.h"

namespace freeio::cpu {

// How many seconds a rank waits for its peers. Applies to exchanges that begin from now on.
void set_timeout(double seconds);
double timeout_in_seconds();

// Called exactly once: when the exchange is complete, or with the error that ended it.
using Done = std::function<void(const Status&)>;

class Session {
 public:
  virtual ~Session() = default;

  // One rank's call. Returns what the caller must do once it holds no lock; empty: nothing.
  virtual std::function<void()> arrive(int64_t rank, Operands&& operands, Done&& done) = 0;

  // Whether all calls of this exchange have come.
  virtual bool all_arrived() const = 0;
};

// "dispatch(num_tokens=4, ...)". It contains everything in which the ranks of one exchange must
// agree.
std::string describe(const Layout& layout, const Operands& operands);

// The middle of a sentence that begins with a rank that waits, and ends with the ranks for which it
// waits. " has waited 30 s (it gives up after 600 s) for ", or " waited 600 s for " at the
// time-out.
std::string waits_on(const Patience& patience);
std::string has_waited(const Patience& patience);
// For a wait that no time-out ends: " has waited 30 s for ".
std::string waits_without_end(const Patience& patience);
// The end of the error at the time-out.
std::string more_time();

// "rank 3 (mesh device 5)", or "ranks 3, 4 (mesh devices 5, 6)". `devices`: by rank.
std::string list_of_ranks(const std::vector<int64_t>& ranks, const std::vector<int64_t>& devices);

}  // namespace freeio::cpu
