// Threads of the CPU engine: they share the work of an exchange, and run what follows it.
#pragma once

#include <cstdint>
#include <functional>

namespace freeio::cpu {

// Runs `task` on an idle thread or a new one, which does nothing else until the task ends. So no
// task waits for another. XLA continues a device's program on the thread that completes its future,
// and that program may block until its peers come. In a pool of bounded size such programs could
// occupy every thread, while the program for which they wait is in the queue.
void run_on_own_thread(std::function<void()> task);

// Calls fn(0) ... fn(count - 1) on the calling thread and on other threads. Returns when all calls
// have ended, and throws the first exception that one of them threw. The caller never waits for a
// free thread, only for calls that already run. Floating-point arithmetic in `fn` is IEEE 754, also
// on threads on which XLA flushes subnormals. `bytes`: about how much memory all calls touch
// together. Small work stays on the calling thread.
void parallel_for(int64_t count, int64_t bytes, const std::function<void(int64_t)>& fn);

}  // namespace freeio::cpu
