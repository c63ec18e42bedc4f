// Threads of the CPU engine: work shared among cores, and continuations that never queue.
#pragma once

#include <cstdint>
#include <functional>

namespace freeio::cpu {

// Runs `task` on a thread that does nothing else until the task ends: an idle one, or a new one.
// A task never waits behind another. XLA continues a device's program on the thread that completes
// its future, and that program may block on its peers; on a bounded pool such continuations could
// occupy every thread while the one that would release them waits in the queue.
void run_on_own_thread(std::function<void()> task);

// Calls fn(0) ... fn(count - 1), on the calling thread and idle cores. Returns when all are done;
// throws the first exception that one of them threw.
// The caller never waits for a thread to become free, only for calls that already run. Floating
// point is IEEE inside `fn`, whatever the threads had set (XLA flushes subnormals on some).
// `bytes`: about how much memory all calls touch together; small work stays on the caller.
void parallel_for(int64_t count, int64_t bytes, const std::function<void(int64_t)>& fn);

}  // namespace freeio::cpu
