// GPUs that run on one CPU thread: every CUDA thread is a fiber, and a seeded scheduler decides
// which goes on.
//
// What the memory does: plain accesses happen in the order in which the scheduler runs the fibers.
// Only relaxed words (send_word) arrive late and in any order, up to the sender's next fence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

constexpr int kMaxGpus = 16;
constexpr int kLanes = 32;

// Where in the source a thread waits; for messages.
struct Place {
  const char* file;
  int line;

  // The caller's, as the default value of an argument.
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// --- For the host side ---------------------------------------------------------------------------

// One kernel launch, ready to run. `call` runs it as one thread.
struct Launch {
  int gpu = 0;
  unsigned ctas = 1;
  unsigned threads = 1;
  size_t shared_bytes = 0;
  std::function<void()> call;
};

// Randomness of all that follows. The same seed and calls: the same schedule.
void set_seed(uint64_t seed);

// Time as the kernels see it. Virtual: it advances with every step, and by leaps when all wait.
// Real, for GPUs whose peers are in other processes: then a machine that only waits sleeps.
void set_real_time(bool real);

// Turns of the scheduler, on average, between looks at the clock of those who poll. (All do when
// nothing else can go on.)
void set_patience(uint32_t turns);

// Appends a launch to a stream: launches of one stream run one after the other.
void enqueue(int stream, Launch launch);

// Runs all streams' launches, side by side, until this stream (-1: every stream) has none left.
// Returns what went wrong in the kernels' use of the machine, a deadlock for instance, or "".
// After that nothing runs any more.
std::string run(int stream);

// Gives all stacks back; nothing can run any more.
void close();

// Switches between fibers so far.
uint64_t steps();

// --- For kernels ---------------------------------------------------------------------------------

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index thread_index, block_index, block_size, grid_size;

// A barrier of the CTA. Whether any thread came with a value that holds.
bool barrier(Place place, bool value = false);

// What the lanes of a warp do together.
enum class Together { kNothing, kShuffle, kBallot, kMatch, kReduce };

// Waits until all lanes have come with their values; returns these.
const uint64_t* gather(Together what, uint64_t value, uint32_t mask, Place place);

// The CTA's dynamic shared memory.
void* shared_memory();

// Another thread may run now.
void preempt();

// Before a load of `bytes` that another CTA or GPU may have stored to. A thread that polls one
// address sleeps in here until the value changes, or it is time to look at the clock.
void before_load(const void* address, size_t bytes, Place place);

// A relaxed store: arrives at any time before the GPU's next fence.
void send_word(uint64_t* address, uint64_t value);

// The same for 128 bytes, which arrive together. The last eight are those that others poll.
constexpr int kLineWords = 16;
void send_line(void* address, const uint64_t (&words)[kLineWords]);

// Whatever this GPU has stored is visible to all.
void fence();

// Copies to shared memory that only their thread may read: there once their group, of all copies
// between two commits, has been waited for. All groups but the last `groups` are.
void start_copy(void* shared, const void* global, size_t bytes);
void commit_copies();
void wait_for_copies(uint64_t groups);

// After a store for which others may poll.
void stored(const void* address);

uint64_t nanoseconds();

}  // namespace emulator
