#include "cpu/local_session.h"

#include <exception>
#include <sstream>
#include <utility>

#include "cpu/exchange.h"
#include "cpu/notes.h"
#include "cpu/threads.h"

namespace freeio::cpu {

LocalSession::LocalSession(const Layout& layout, std::vector<int64_t> devices)
    : layout_(layout),
      devices_(std::move(devices)),
      patience_(timeout_in_seconds()),
      operands_(layout.num_ranks),
      done_(layout.num_ranks) {}

std::function<void()> LocalSession::arrive(int64_t rank, Operands&& operands, Done&& done) {
  std::lock_guard lock(mutex_);
  ++num_arrived_;
  if (!failure_.ok()) return [done = std::move(done), status = failure_] { done(status); };
  operands_[rank] = std::move(operands);
  done_[rank] = std::move(done);
  is_running_ = num_arrived_ == layout_.num_ranks;
  if (is_running_) {
    if (num_arrived_ > 1) stop_watching(shared_from_this());
    return [self = shared_from_this(), rank] { self->run(rank); };
  }
  if (num_arrived_ == 1) watch(shared_from_this());
  return nullptr;
}

bool LocalSession::all_arrived() const {
  std::lock_guard lock(mutex_);
  return num_arrived_ == layout_.num_ranks;
}

// All ranks have called. No other thread touches the session any more.
void LocalSession::run(int64_t last_rank) {
  Status status;
  try {
    std::vector<Operands> ranks;
    ranks.reserve(operands_.size());
    for (auto& operands : operands_) ranks.push_back(std::move(*operands));
    run_exchange(layout_, ranks, Homes(ranks.size()));
  } catch (const std::exception& error) {
    status = {Code::kInternal, std::string("freeio_jax: the exchange failed: ") + error.what()};
  }
  // The last rank comes last, because its `done` continues the device's program on this thread.
  for (size_t rank = 0; rank < done_.size(); ++rank) {
    if (static_cast<int64_t>(rank) == last_rank) continue;
    run_on_own_thread([done = std::move(done_[rank]), status] { done(status); });
  }
  done_[last_rank](status);
}

// Reports in the log which ranks wait. At the time-out all ranks that wait get an error, and so do
// ranks that come later.
bool LocalSession::look() {
  std::vector<Done> waiting;
  {
    std::lock_guard lock(mutex_);
    if (is_running_ || !failure_.ok()) return false;
    if (!patience_.at_end()) {
      note(who_waits_for_whom(waits_on(patience_)));
      patience_.extend();
      return true;
    }
    failure_ = {Code::kDeadlineExceeded,
                who_waits_for_whom(has_waited(patience_)) +
                    " All ranks of the expert axis must make the same calls in the same order: "
                    "look for one under a lax.cond or lax.while_loop whose condition differs "
                    "between ranks." +
                    more_time()};
    for (auto& done : done_) {
      if (done) waiting.push_back(std::move(done));
    }
  }
  for (auto& done : waiting) {
    run_on_own_thread([done = std::move(done), status = failure_] { done(status); });
  }
  return false;
}

std::string LocalSession::who_waits_for_whom(const std::string& how_long) const {
  std::vector<int64_t> here, missing;
  const char* op = "exchange";
  for (size_t rank = 0; rank < operands_.size(); ++rank) {
    (operands_[rank] ? here : missing).push_back(static_cast<int64_t>(rank));
    if (operands_[rank]) op = name_of(*operands_[rank]);
  }
  std::ostringstream text;
  text << "freeio_jax." << op << ": " << list_of_ranks(here, devices_) << how_long
       << list_of_ranks(missing, devices_) << " of " << layout_.num_ranks
       << ", which did not make this call.";
  return text.str();
}

}  // namespace freeio::cpu
