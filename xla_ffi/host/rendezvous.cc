#include "host/rendezvous.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <iomanip>
#include <optional>
#include <set>
#include <sstream>
#include <thread>

#include "host/threads.h"

namespace freeio::host {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<double> timeout_seconds{60.0};

std::string list_of_ranks(const std::vector<int64_t>& ranks, const std::vector<int64_t>& devices) {
  std::ostringstream text;
  text << (ranks.size() == 1 ? "rank " : "ranks ");
  for (size_t i = 0; i < ranks.size(); ++i) text << (i ? ", " : "") << ranks[i];
  text << " (mesh device" << (ranks.size() == 1 ? " " : "s ");
  for (size_t i = 0; i < ranks.size(); ++i) text << (i ? ", " : "") << devices[ranks[i]];
  text << ")";
  return text.str();
}

}  // namespace

void set_timeout(double seconds) { timeout_seconds = seconds; }

// One exchange of one group: collects the ranks' operands, then runs it or fails.
class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(const Layout& layout, std::vector<int64_t> devices)
      : layout_(layout),
        devices_(std::move(devices)),
        timeout_(timeout_seconds),
        deadline_(Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                     std::chrono::duration<double>(timeout_))),
        operands_(layout.num_ranks),
        done_(layout.num_ranks) {}

  Clock::time_point deadline() const { return deadline_; }

  enum class Arrival { kWaiting, kLast, kFailed };

  // kLast: all are here, and the caller goes on with run(). kFailed: `done` was not taken, and the
  // caller tells it failure().
  Arrival arrive(int64_t rank, Operands&& operands, Rendezvous::Done& done) {
    std::lock_guard lock(mutex_);
    ++arrived_;
    if (!failure_.ok()) return Arrival::kFailed;
    operands_[rank] = std::move(operands);
    done_[rank] = std::move(done);
    running_ = arrived_ == layout_.num_ranks;
    return running_ ? Arrival::kLast : Arrival::kWaiting;
  }

  // Fixed once arrive() has said kFailed.
  const Status& failure() const { return failure_; }

  bool all_arrived() const {
    std::lock_guard lock(mutex_);
    return arrived_ == layout_.num_ranks;
  }

  // All ranks are here. Nobody else touches the session any more.
  void run(int64_t last_rank) {
    Status status;
    try {
      std::vector<Operands> ranks;
      ranks.reserve(operands_.size());
      for (auto& operands : operands_) ranks.push_back(std::move(*operands));
      run_exchange(layout_, ranks);
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

  // The deadline has passed: fails the ranks that wait, and those that come later.
  void expire() {
    std::vector<Rendezvous::Done> waiting;
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

 private:
  std::string timeout_message() const {
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

  const Layout layout_;
  const std::vector<int64_t> devices_;
  const double timeout_;
  const Clock::time_point deadline_;
  mutable std::mutex mutex_;
  int64_t arrived_ = 0;
  bool running_ = false;
  Status failure_;
  std::vector<std::optional<Operands>> operands_;
  std::vector<Rendezvous::Done> done_;
};

namespace {

// Expires sessions whose deadline has passed. One thread, started by the first session that waits.
class Deadlines {
 public:
  void add(const std::shared_ptr<Session>& session) {
    std::lock_guard lock(mutex_);
    if (!started_) {
      std::thread([this] { watch(); }).detach();
      started_ = true;
    }
    const bool earliest = waiting_.empty() || session->deadline() < (*waiting_.begin())->deadline();
    waiting_.insert(session);
    if (earliest) changed_.notify_one();
  }

  void remove(const std::shared_ptr<Session>& session) {
    std::lock_guard lock(mutex_);
    waiting_.erase(session);
  }

 private:
  struct ByDeadline {
    bool operator()(const std::shared_ptr<Session>& a, const std::shared_ptr<Session>& b) const {
      return std::make_pair(a->deadline(), a.get()) < std::make_pair(b->deadline(), b.get());
    }
  };

  void watch() {
    std::unique_lock lock(mutex_);
    while (true) {
      if (waiting_.empty()) {
        changed_.wait(lock);
        continue;
      }
      const Clock::time_point deadline = (*waiting_.begin())->deadline();
      if (Clock::now() < deadline) {
        changed_.wait_until(lock, deadline);
        continue;
      }
      std::shared_ptr<Session> session = *waiting_.begin();
      waiting_.erase(waiting_.begin());
      lock.unlock();
      session->expire();
      session.reset();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<std::shared_ptr<Session>, ByDeadline> waiting_;
  bool started_ = false;
};

// Lives until the process ends, as its thread does.
Deadlines& deadlines() {
  static Deadlines* const instance = std::make_unique<Deadlines>().release();
  return *instance;
}

}  // namespace

Rendezvous::Rendezvous(const Layout& layout, std::vector<int64_t> groups)
    : layout_(layout), groups_(std::move(groups)) {
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < groups_.size(); ++i) {
    member_of_device_[groups_[i]] = static_cast<int64_t>(i);
  }
}

// XLA destroys the instance after its last call has returned, on whatever thread; taking the lock
// orders the members' destruction after what the calls wrote under it. (XLA orders them too, but
// where a race detector that sees only this engine cannot know of it. The same holds above.)
Rendezvous::~Rendezvous() { std::lock_guard lock(mutex_); }

void Rendezvous::arrive(int64_t run, int64_t device, Operands operands, Done done) {
  std::shared_ptr<Session> session;
  Session::Arrival arrival;
  int64_t rank;
  {
    std::unique_lock lock(mutex_);
    const auto member = member_of_device_.find(device);
    if (member == member_of_device_.end()) {
      lock.unlock();
      done({Code::kInternal, "freeio_jax: mesh device " + std::to_string(device) +
                                 " is in no group of the expert axis: a bug in freeio_jax."});
      return;
    }
    const int64_t group = member->second / layout_.num_ranks;
    rank = member->second % layout_.num_ranks;
    Run& calls = runs_.try_emplace({run, group}).first->second;
    calls.calls.resize(layout_.num_ranks);
    const int64_t number = calls.calls[rank]++;
    std::shared_ptr<Session>& open = calls.open[number];
    const bool first = open == nullptr;
    if (first) {
      const auto devices = groups_.begin() + group * layout_.num_ranks;
      open = std::make_shared<Session>(layout_,
                                       std::vector<int64_t>(devices, devices + layout_.num_ranks));
    }
    session = open;
    arrival = session->arrive(rank, std::move(operands), done);
    if (session->all_arrived()) {
      calls.open.erase(number);
      // With all ranks at the same number of calls the run's counts can start anew.
      if (calls.open.empty()) runs_.erase({run, group});
      if (!first) deadlines().remove(session);
    } else if (first) {
      deadlines().add(session);
    }
  }
  if (arrival == Session::Arrival::kLast) session->run(rank);
  if (arrival == Session::Arrival::kFailed) done(session->failure());
}

}  // namespace freeio::host
