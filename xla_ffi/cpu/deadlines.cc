#include "cpu/deadlines.h"

#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

namespace freeio::cpu {
namespace {

// One thread, started by the first item.
class Deadlines {
 public:
  void add(const std::shared_ptr<Waiting>& item) {
    std::lock_guard lock(mutex_);
    if (!has_thread_) {
      std::thread([this] { serve(); }).detach();
      has_thread_ = true;
    }
    const bool earliest = waiting_.empty() || item->due() < (*waiting_.begin())->due();
    waiting_.insert(item);
    if (earliest) changed_.notify_one();
  }

  void remove(const std::shared_ptr<Waiting>& item) {
    std::lock_guard lock(mutex_);
    waiting_.erase(item);
  }

 private:
  struct ByTime {
    bool operator()(const std::shared_ptr<Waiting>& a, const std::shared_ptr<Waiting>& b) const {
      return std::make_pair(a->due(), a.get()) < std::make_pair(b->due(), b.get());
    }
  };

  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      if (waiting_.empty()) {
        changed_.wait(lock);
        continue;
      }
      const Clock::time_point due = (*waiting_.begin())->due();
      if (Clock::now() < due) {
        changed_.wait_until(lock, due);
        continue;
      }
      std::shared_ptr<Waiting> item = *waiting_.begin();
      waiting_.erase(waiting_.begin());
      lock.unlock();
      const bool again = item->look();
      lock.lock();
      if (again) {
        waiting_.insert(std::move(item));
        continue;
      }
      lock.unlock();
      item.reset();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<std::shared_ptr<Waiting>, ByTime> waiting_;
  bool has_thread_ = false;
};

// Lives until the process ends, as its thread does.
Deadlines& deadlines() {
  static Deadlines* const instance = std::make_unique<Deadlines>().release();
  return *instance;
}

}  // namespace

void watch(const std::shared_ptr<Waiting>& item) { deadlines().add(item); }
void stop_watching(const std::shared_ptr<Waiting>& item) { deadlines().remove(item); }

}  // namespace freeio::cpu
