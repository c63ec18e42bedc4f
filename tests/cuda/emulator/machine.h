// GPUs that run on one CPU thread. Every CUDA thread is a fiber, and a seeded scheduler decides
// which fiber goes on.
//
// Plain accesses to memory happen in the order in which the scheduler runs the fibers. Words
// (send_word) and lines (send_line) arrive late, and in any order up to the sender's next fence.
// But words for one address arrive in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

// As many as the engine takes: see gpu_block.h.
#ifdef FREEIO_MAX_RANKS
constexpr int kMaxGpus = FREEIO_MAX_RANKS;
#else
constexpr int kMaxGpus = 16;
#endif
constexpr int kLanes = 32;

// Where in the source a thread waits, for messages.
struct SourceLine {
  const char* file;
  int line;

  // The caller's, as the default value of an argument.
  static constexpr SourceLine here(const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
    return {file, line};
  }
};

// --- For the host side ---------------------------------------------------------------------------

// An event of CUDA. A stream waits for the last record that was made before the wait.
struct Event {
  uint64_t recorded = 0;  // number of the last record
  uint64_t happened = 0;  // number of the last record to which its stream has come
};

// One kernel launch, ready to run. `call` runs it as one thread.
struct Launch {
  int gpu = 0;
  unsigned ctas = 1;
  unsigned threads = 1;
  size_t shared_bytes = 0;
  std::function<void()> call;
  // Each CTA takes a multiprocessor of the GPU while it runs. Else the launch stands for something
  // that takes none, such as a copy.
  bool takes_multiprocessors = true;
  bool has_priority = false;  // over the CTAs of other launches that have not begun
  Event* begun = nullptr;     // recorded when all CTAs have begun; null: none
};

// Seeds the scheduler. The same seed and calls give the same schedule.
void set_seed(uint64_t seed);

// Whether kernels see real time. Virtual time advances with every step, and by leaps when all
// threads wait. Real time is for GPUs whose peers are in other processes. Then a machine on which
// all threads wait sleeps.
void set_real_time(bool real);

// After how many turns of the scheduler, on average, the threads of a CTA that poll look at the
// clock. (They also do when no other thread can go on.)
void set_patience(uint32_t turns);

// Of each GPU.
void set_multiprocessors(unsigned count);

// Whether the event of a launch's CTAs may also be recorded late, when the kernel has ended. CUDA
// allows that.
void set_late_events(bool late);

// Appends a launch to a stream. Launches of one stream run one after the other. Up to kMaxGpus a
// stream is the one with the GPU's number.
void enqueue(int stream, Launch launch);

// Appends a record of the event, or a wait for its last record, to a stream.
void record(int stream, Event& event);
void wait(int stream, const Event& event);

// Runs the launches of all streams concurrently, until this stream (-1: every stream) has none
// left. Returns an error if the kernels used the machine in a wrong way, for instance a deadlock.
// Else "". After an error nothing runs any more.
std::string run(int stream);

// --- The network between hosts -------------------------------------------------------------------

// A GPU's part of the symmetric heap, to which other GPUs put.
void set_heap(int gpu, void* base, size_t bytes);
// Whether GPUs reach each other's part of the heap by a link, too.
void set_linked(bool are_linked);

// Faults of the network, for tests that show what the kernels rely on. `kinds`: a bit for each kind
// of signal. Lost signals never arrive. Kernels take unawaited signals for arrived ones at once.
struct NetworkFaults {
  bool ignores_fences = false;
  uint32_t lost_kinds = 0;
  uint32_t unawaited_kinds = 0;
};
void set_network_faults(const NetworkFaults& faults);

// Bytes that have been put so far, signals not included.
uint64_t network_bytes();

// Frees all stacks. Nothing can run any more.
void close();

// How many times the scheduler has switched to a fiber.
uint64_t steps();

// --- For kernels ---------------------------------------------------------------------------------

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index thread_index, block_index, block_size, grid_size;

// A barrier of the CTA. Returns whether any thread passed true.
bool barrier(SourceLine where, bool value = false);

// An operation that the lanes of a warp make together.
enum class Together { kNothing, kShuffle, kBallot, kMatch, kReduce };

// Waits until all lanes have called it, and returns their values.
const uint64_t* gather(Together what, uint64_t value, uint32_t mask, SourceLine where);

// The CTA's dynamic shared memory.
void* shared_memory();

// Lets the scheduler switch to another thread.
void preempt();

// Call this before a load of `bytes` to which another CTA or GPU may store. A thread that polls one
// address sleeps here until the value changes, or until it must look at the clock.
void before_load(const void* address, size_t bytes, SourceLine where);

// A relaxed store. It arrives at any time, at the latest at the GPU's next fence.
void send_word(uint64_t* address, uint64_t value);

// The same for 128 bytes, which arrive together. Other threads poll the last eight of them.
constexpr int kLineWords = 16;
void send_line(void* address, const uint64_t (&words)[kLineWords]);

// Makes everything that this GPU has stored visible to all.
void fence();

// The network. `symmetric` is an address in the heap of the GPU that runs the thread, and stands
// for the same place in the heap of `gpu`. What is put arrives at any time, also after the kernel
// has ended, and is read from `from` only then. A signal arrives at any time, too. Things to one
// GPU that are on different sides of a fence of their warp arrive in order. One thread.
void network_put(void* symmetric, const void* from, size_t bytes, int gpu);
void network_signal(int kind, uint64_t* symmetric, uint64_t value, int gpu);
void network_fence();
// The place in the heap of `gpu`, as the GPU that runs the thread sees it; null: only the network
// reaches it.
void* linked(const void* symmetric, int gpu);
// Whether tests want kernels to go on without this kind of signal.
bool is_unawaited(int kind);

// Asynchronous copies to shared memory, which only the thread that starts them may read. The copies
// between two commits are a group. wait_for_copies() completes all groups except for the last
// `groups`.
void start_copy(void* shared, const void* global, size_t bytes);
void commit_copies();
void wait_for_copies(uint64_t groups);

// Stores from shared memory that the thread does not wait for, in pieces of 16 bytes. Each is read
// at any time, at the latest when the thread waits for that. It arrives at any time after, at the
// latest when the thread waits for its stores, which must be before the thread ends.
void start_bulk_store(void* global, const void* shared, size_t bytes);
void wait_for_bulk_reads();
void wait_for_bulk_stores();

// Call this after a store for which other threads may poll.
void stored(const void* address);

uint64_t nanoseconds();

}  // namespace emulator
