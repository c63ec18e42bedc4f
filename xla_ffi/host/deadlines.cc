#include "host/deadlines.h"

#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

namespace freeio::host {
namespace {

// One thread, started by the first item.
class Deadlines {
 public:
  void add(const std::shared_ptr<Expiring>& item) {
    std::lock_guard lock(mutex_);
    if (!started_) {
      std::thread([this] { watch(); }).detach();
      started_ = true;
    }
    const bool earliest = waiting_.empty() || item->deadline() < (*waiting_.begin())->deadline();
    waiting_.insert(item);
    if (earliest) changed_.notify_one();
  }

  void remove(const std::shared_ptr<Expiring>& item) {
    std::lock_guard lock(mutex_);
    waiting_.erase(item);
  }

 private:
  struct ByDeadline {
    bool operator()(const std::shared_ptr<Expiring>& a, const std::shared_ptr<Expiring>& b) const {
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
      std::shared_ptr<Expiring> item = *waiting_.begin();
      waiting_.erase(waiting_.begin());
      lock.unlock();
      item->expire();
      item.reset();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<std::shared_ptr<Expiring>, ByDeadline> waiting_;
  bool started_ = false;
};

// Lives until the process ends, as its thread does.
Deadlines& deadlines() {
  static Deadlines* const instance = std::make_unique<Deadlines>().release();
  return *instance;
}

}  // namespace

void add_deadline(const std::shared_ptr<Expiring>& item) { deadlines().add(item); }
void remove_deadline(const std::shared_ptr<Expiring>& item) { deadlines().remove(item); }

}  // namespace freeio::host
