#include "cuda/overlap.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "cuda/current_device.h"

namespace freeio::cuda {
namespace {

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

Status make_event(void*& event) {
  cudaEvent_t made = nullptr;
  Status status = cuda_status(cudaEventCreateWithFlags(&made, cudaEventDisableTiming),
                              "cudaEventCreateWithFlags");
  event = made;
  return status;
}

Status record(void* event, void* stream) {
  return cuda_status(cudaEventRecord(event_of(event), stream_of(stream)), "cudaEventRecord");
}

Status wait_for(void* event, void* stream) {
  return cuda_status(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0),
                     "cudaStreamWaitEvent");
}

// The pairs of a name that lack a custom call, or whose programs still exist.
struct Pairs {
  std::mutex mutex;
  std::map<std::pair<uint64_t, int64_t>, std::vector<std::weak_ptr<StartPair>>> by_name;
};

// Lives until the process ends, because XLA may make programs while its statics are destroyed.
Pairs& pairs() {
  static Pairs* const instance = std::make_unique<Pairs>().release();
  return *instance;
}

using Flag = std::atomic<bool> StartPair::*;

// Sets the `own` flag of the last pair that lacks it, or of a new one.
std::shared_ptr<StartPair> pair(uint64_t program, int64_t number, Flag own) {
  std::lock_guard lock(pairs().mutex);
  auto& all = pairs().by_name[{program, number}];
  all.erase(std::remove_if(all.begin(), all.end(), [](const auto& one) { return one.expired(); }),
            all.end());
  std::shared_ptr<StartPair> found;
  for (auto one = all.rbegin(); one != all.rend() && found == nullptr; ++one) {
    std::shared_ptr<StartPair> candidate = one->lock();
    if (candidate != nullptr && !((*candidate).*own)) found = std::move(candidate);
  }
  if (found == nullptr) {
    found = std::make_shared<StartPair>();
    all.push_back(found);
  }
  ((*found).*own) = true;
  return found;
}

// Compares the buffers of a wait with those of the start: the arguments of the wait are the start's
// arguments and results, and its results are the first ones of the start's. Empty: they are the
// same. Else the first one that is not.
std::string difference(const CallBuffers& wait, const CallBuffers& start) {
  std::vector<const void*> all = start.arguments;
  all.insert(all.end(), start.results.begin(), start.results.end());
  if (wait.arguments.size() != all.size() || wait.results.size() > start.results.size()) {
    return "their number";
  }
  for (size_t i = 0; i < all.size(); ++i) {
    if (wait.arguments[i] != all[i]) return "operand " + std::to_string(i);
  }
  for (size_t i = 0; i < wait.results.size(); ++i) {
    if (wait.results[i] != start.results[i]) return "result " + std::to_string(i);
  }
  return "";
}

std::string start_name(Operation operation) {
  return std::string("freeio_jax.") + name_of(operation) + "_start";
}

}  // namespace

Status Overlap::make(std::unique_ptr<Overlap>& made) {
  // A pointer to the private constructor's object cannot come from make_unique().
  std::unique_ptr<Overlap> overlap(new Overlap);
  int least = 0, greatest = 0;
  Status status = cuda_status(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                              "cudaDeviceGetStreamPriorityRange");
  if (!status.ok()) return status;
  cudaStream_t stream = nullptr;
  status = cuda_status(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
                       "cudaStreamCreateWithPriority");
  overlap->stream_ = stream;
  if (status.ok()) status = make_event(overlap->fork_);
  if (status.ok()) status = make_event(overlap->begun_);
  for (int i = 0; i < kMaxInFlight && status.ok(); ++i) {
    void* event = nullptr;
    status = make_event(event);
    overlap->free_.push_back(event);
  }
  if (status.ok()) made = std::move(overlap);
  return status;
}

Overlap::~Overlap() {
  for (InFlight& one : in_flight_) free_.push_back(one.end);
  free_.insert(free_.end(), {fork_, begun_});
  for (void* event : free_) {
    if (event != nullptr) cudaEventDestroy(event_of(event));
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_of(stream_));
}

// The event for the next start of the run. A program that ended with an error does not wait for
// what it had started. Such exchanges of other runs are forgotten when their events are needed.
Status Overlap::take_event(const StartName& name, Operation operation, void*& event) {
  RelaxedCapture relaxed;  // CUDA refuses cudaEventQuery() while a stream is captured
  for (auto one = in_flight_.begin(); free_.empty() && one != in_flight_.end(); ++one) {
    if (one->name.run == name.run) continue;
    const cudaError_t error = cudaEventQuery(event_of(one->end));
    if (error == cudaErrorNotReady) continue;
    if (error != cudaSuccess) return cuda_status(error, "cudaEventQuery");
    free_.push_back(one->end);
    in_flight_.erase(one);
    break;
  }
  if (free_.empty()) {
    return {Code::kInvalidArgument,
            start_name(operation) + ": " + std::to_string(kMaxInFlight) +
                " exchanges are in flight on this GPU already, and the engine takes no more. Call "
                "done() on one of them before."};
  }
  event = free_.back();
  free_.pop_back();
  return {};
}

Status Overlap::start(const StartName& name, Operation operation, CallBuffers buffers,
                      const LoadedKernel& kernel, const Launch& launch, void* stream) {
  std::lock_guard lock(mutex_);
  const bool is_behind_another =
      std::any_of(in_flight_.begin(), in_flight_.end(),
                  [&](const InFlight& other) { return other.name.run == name.run; });
  void* end = nullptr;
  Status status = take_event(name, operation, end);
  if (!status.ok()) return status;
  status = record(fork_, stream);
  if (status.ok()) status = wait_for(fork_, stream_);
  if (status.ok()) {
    status = kernel.launch(launch, stream_, is_behind_another ? nullptr : begun_);
  }
  if (status.ok() && !is_behind_another) status = wait_for(begun_, stream);
  if (status.ok()) status = record(end, stream_);
  if (status.ok()) {
    in_flight_.push_back({name, operation, std::move(buffers), end});
  } else {
    free_.push_back(end);
  }
  return status;
}

Status Overlap::wait(const StartName& name, const CallBuffers& buffers, void* stream) {
  std::lock_guard lock(mutex_);
  // A program that XLA has unrolled may have several starts of one name in flight.
  auto found = in_flight_.end();
  std::string differs;
  for (auto one = in_flight_.begin(); one != in_flight_.end(); ++one) {
    if (!(one->name == name)) continue;
    differs = difference(buffers, one->buffers);
    found = one;
    if (differs.empty()) break;
  }
  if (found == in_flight_.end()) {
    return {Code::kInvalidArgument,
            "freeio_jax: done() waits for an exchange that this run of the program has not started "
            "on this GPU, or for which it has waited before. Call done() once for each start, in "
            "the program and loop body that has the start."};
  }
  const Operation operation = found->operation;
  Status status = wait_for(found->end, stream);
  free_.push_back(found->end);
  in_flight_.erase(found);
  if (!status.ok() || differs.empty()) return status;
  return {Code::kInternal,
          start_name(operation) + ": XLA has given done() other buffers than the start (" +
              differs +
              "), so it has copied or reused one while the exchange used it. Call done() in the "
              "program and loop body that has the start, and use only the arrays that it returns."};
}

void Overlap::wait_for_all(void* stream) {
  std::lock_guard lock(mutex_);
  if (in_flight_.empty()) return;
  // The caller returns an error already.
  static_cast<void>(wait_for(in_flight_.back().end, stream));
}

std::shared_ptr<StartPair> pair_start(uint64_t program, int64_t number) {
  return pair(program, number, &StartPair::has_start);
}
std::shared_ptr<StartPair> pair_wait(uint64_t program, int64_t number) {
  return pair(program, number, &StartPair::has_wait);
}

Status never_waited_for(Operation operation) {
  const std::string start = start_name(operation);
  return {Code::kInvalidArgument,
          start +
              ": the program starts this exchange and never waits for it. Call done() on what " +
              start + " returns, in the same program and loop body."};
}

}  // namespace freeio::cuda
