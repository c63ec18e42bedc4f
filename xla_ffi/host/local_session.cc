#include "host/local_session.h"

#include <exception>
#include <iomanip>
#include <sstream>
#include <utility>

#include "host/threads.h"

namespace freeio::host {

LocalSession::LocalSession(const Layout& layout, std::vector<int64_t> devices)
    : layout_(layout),
      devices_(std::move(devices)),
      timeout_(timeout_in_seconds()),
      deadline_(Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                   std::chrono::duration<double>(timeout_))),
      operands_(layout.num_ranks),
      done_(layout.num_ranks) {}

std::function<void()> LocalSession::arrive(int64_t rank, Operands&& operands, Done&& done) {
  std::lock_guard lock(mutex_);
  ++arrived_;
  if (!failure_.ok()) return [done = std::move(done), status = failure_] { done(status); };
  operands_[rank] = std::move(operands);
  done_[rank] = std::move(done);
  running_ = arrived_ == layout_.num_ranks;
  if (running_) {
    if (arrived_ > 1) remove_deadline(shared_from_this());
    return [self = shared_from_this(), rank] { self->run(rank); };
  }
  if (arrived_ == 1) add_deadline(shared_from_this());
  return nullptr;
}

bool LocalSession::all_arrived() const {
  std::lock_guard lock(mutex_);
  return arrived_ == layout_.num_ranks;
}

// All ranks are here. Nobody else touches the session any more.
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
  // The others first: this rank's thread goes on with its program once it is told.
  for (size_t rank = 0; rank < done_.size(); ++rank) {
    if (static_cast<int64_t>(rank) == last_rank) continue;
    run_on_own_thread([done = std::move(done_[rank]), status] { done(status); });
  }
  done_[last_rank](status);
}

// Fails the ranks that wait, and those that come later.
void LocalSession::expire() {
  std::vector<Done> waiting;
  {
    std::lock_guard lock(mutex_);
    if (running_ || !failure_.ok()) return;
    failure_ = {Code::kDeadlineExceeded, timeout_message()};
    for (auto& done : done_) {
      if (done) waiting.push_back(std::move(done));
    }
  }
  for (auto& done : waiting) {
    run_on_own_thread([done = std::move(done), status = failure_] { done(status); });
  }
}

std::string LocalSession::timeout_message() const {
  std::vector<int64_t> here, missing;
  const char* op = "exchange";
  for (size_t rank = 0; rank < operands_.size(); ++rank) {
    (operands_[rank] ? here : missing).push_back(static_cast<int64_t>(rank));
    if (operands_[rank]) op = name_of(*operands_[rank]);
  }
  std::ostringstream text;
  text << "freeio_jax." << op << ": " << list_of_ranks(here, devices_) << " waited "
       << std::setprecision(4) << timeout_ << " s for " << list_of_ranks(missing, devices_)
       << " of " << layout_.num_ranks
       << ", which did not make this call. All ranks of the expert axis must make the same calls "
          "in the same order: look for one under a lax.cond or lax.while_loop whose condition "
          "differs between ranks. If a rank is only slow, allow more time with "
          "freeio_jax.config(timeout=seconds) or FREEIO_TIMEOUT.";
  return text.str();
}

}  // namespace freeio::host
