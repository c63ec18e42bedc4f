// Exchanges that run beside compute. A program starts such an exchange and waits for its end later.
//
// They run on a stream of the engine's own, in the lane kOverlap. On each GPU they run one after
// the other, in the order in which they are started.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/operations.h"
#include "core/status.h"
#include "cuda/launch.h"

namespace freeio::cuda {

// The most exchanges of a GPU that a program may have started and not waited for.
constexpr int kMaxInFlight = 16;

// By this name a program's wait finds the exchange that it waits for.
struct StartName {
  uint64_t program = 0;  // a digest
  int64_t number = 0;    // of the start in the program
  int64_t run = 0;       // of the program

  bool operator==(const StartName& other) const {
    return program == other.program && number == other.number && run == other.run;
  }
};

// The buffers of a custom call, in XLA's order. All buffers of a start are arguments of the wait,
// so XLA keeps them for the kernel until then. The results of the wait are the start's results, in
// place, without the scratch.
struct CallBuffers {
  std::vector<const void*> arguments;
  std::vector<const void*> results;
};

// The overlap stream of one GPU. Any threads may use it.
class Overlap {
 public:
  // Of the calling thread's GPU.
  static Status make(std::unique_ptr<Overlap>& made);
  ~Overlap();
  Overlap(const Overlap&) = delete;
  Overlap& operator=(const Overlap&) = delete;

  // Launches the kernel behind everything that is on `stream` now. What comes on `stream` later
  // runs beside the kernel. It begins when all CTAs of the kernel run, because a matrix product
  // could take all multiprocessors before them. But if the run has another exchange in flight,
  // nothing waits for the CTAs, because they begin only when that exchange has ended.
  Status start(const StartName& name, Operation operation, CallBuffers buffers,
               const LoadedKernel& kernel, const Launch& launch, void* stream);

  // Makes `stream` wait for the end of the exchange. An error if there is no such exchange in
  // flight, or if its buffers are not these: then XLA has copied one while the kernel wrote it, or
  // has reused one.
  Status wait(const StartName& name, const CallBuffers& buffers, void* stream);

  // Makes `stream` wait for the end of everything that was started. For a program that ends with
  // an error, because XLA then reuses the buffers of what it has started.
  void wait_for_all(void* stream);

 private:
  struct InFlight {
    StartName name;
    Operation operation;
    CallBuffers buffers;
    void* end;  // a cudaEvent_t
  };

  Overlap() = default;
  Status take_event(const StartName& name, Operation operation, void*& event);

  std::mutex mutex_;
  void* stream_ = nullptr;           // a cudaStream_t
  void* fork_ = nullptr;             // cudaEvent_t: the caller's stream came to the last start
  void* begun_ = nullptr;            // cudaEvent_t: all CTAs of the last start run
  std::vector<void*> free_;          // cudaEvent_t, for the ends of exchanges
  std::vector<InFlight> in_flight_;  // in the order of their starts
};

// Whether a program has both custom calls of an exchange, the start and the wait.
struct StartPair {
  std::atomic<bool> has_start{false};
  std::atomic<bool> has_wait{false};
};
// Called for each custom call when XLA makes it. `program` and `number` are those of the
// StartName. XLA makes both calls of a pair before the program runs. Other programs can have calls
// of the same name: those that were made last belong together.
std::shared_ptr<StartPair> pair_start(uint64_t program, int64_t number);
std::shared_ptr<StartPair> pair_wait(uint64_t program, int64_t number);

// The error of a start whose pair has no wait.
Status never_waited_for(Operation operation);

}  // namespace freeio::cuda
