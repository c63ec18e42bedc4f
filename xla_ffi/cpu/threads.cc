#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace freeio::cpu {
namespace {

constexpr std::chrono::seconds kIdleThreadLife{10};

// With fewer bytes a second thread costs more than it saves. (To wake one takes some 10 us.)
constexpr int64_t kMinParallelBytes = 256 << 10;

class ThreadCache {
 public:
  void run(std::function<void()> task) {
    {
      std::lock_guard lock(mutex_);
      if (num_idle_ > 0) {
        --num_idle_;
        tasks_.push_back(std::move(task));
        work_.notify_one();
        return;
      }
    }
    auto shared = std::make_shared<std::function<void()>>(std::move(task));
    try {
      std::thread([this, shared] {
        (*shared)();
        *shared = nullptr;
        serve();
      }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads, so the task runs on this one.
      (*shared)();
    }
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      ++num_idle_;
      work_.wait_for(lock, kIdleThreadLife, [this] { return !tasks_.empty(); });
      if (tasks_.empty()) {
        --num_idle_;
        return;
      }
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      task = nullptr;
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::function<void()>> tasks_;  // for each of them a thread has been woken
  int num_idle_ = 0;                         // threads that wait for a task
};

// Lives until the process ends: its threads are detached and may outlast static destructors.
ThreadCache& thread_cache() {
  static ThreadCache* const cache = std::make_unique<ThreadCache>().release();
  return *cache;
}

class IeeeFloatingPoint {
 public:
  IeeeFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~IeeeFloatingPoint() { std::fesetenv(&saved_); }
  IeeeFloatingPoint(const IeeeFloatingPoint&) = delete;
  IeeeFloatingPoint& operator=(const IeeeFloatingPoint&) = delete;

 private:
  std::fenv_t saved_;
};

// Shared by the caller and its helpers. A helper may start after all calls have ended. Then it
// finds no index that is left.
struct ParallelWork {
  ParallelWork(int64_t size, const std::function<void(int64_t)>& function)
      : count(size), fn(function) {}

  const int64_t count;
  const std::function<void(int64_t)>& fn;  // valid until all indices are done
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t num_done = 0;
  std::exception_ptr error;  // the first that `fn` threw

  void take_part() {
    const IeeeFloatingPoint ieee;
    int64_t num_ended = 0;
    std::exception_ptr thrown;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++num_ended) {
      try {
        if (!thrown) fn(i);
      } catch (...) {
        thrown = std::current_exception();
      }
    }
    if (num_ended == 0) return;
    std::lock_guard lock(mutex);
    if (thrown && !error) error = thrown;
    num_done += num_ended;
    if (num_done == count) all_done.notify_all();
  }

  void wait() {
    std::unique_lock lock(mutex);
    all_done.wait(lock, [this] { return num_done == count; });
    if (error) std::rethrow_exception(error);
  }
};

}  // namespace

void run_on_own_thread(std::function<void()> task) {
  // The continuation computes under the floating-point settings of the thread that began it.
  std::fenv_t environment;
  std::fegetenv(&environment);
  thread_cache().run([environment, task = std::move(task)] {
    std::fesetenv(&environment);
    task();
  });
}

void parallel_for(int64_t count, int64_t bytes, const std::function<void(int64_t)>& fn) {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t helpers = bytes < kMinParallelBytes ? 0 : std::min(cores, count) - 1;
  if (helpers <= 0) {
    const IeeeFloatingPoint ieee;
    for (int64_t i = 0; i < count; ++i) fn(i);
    return;
  }
  auto work = std::make_shared<ParallelWork>(count, fn);
  for (int64_t i = 0; i < helpers; ++i) thread_cache().run([work] { work->take_part(); });
  work->take_part();
  work->wait();
}

}  // namespace freeio::cpu
