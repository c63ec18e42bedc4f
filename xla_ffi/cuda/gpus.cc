#include "cuda/gpus.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "core/patience.h"
#include "cuda/current_device.h"
#include "cuda/failure.h"
#include "cuda/gpu.h"
#include "cuda/overlap.h"
#include "cuda/peers.h"

namespace freeio::cuda {
namespace {

struct Engine {
  std::mutex mutex;
  // Host blocks of this process's GPUs, by GPU number. May be read without the mutex.
  std::atomic<HostBlock*> hosts[kMaxRanks] = {};
  std::map<int, Gpu> gpus;       // by GPU number
  std::unique_ptr<Peers> peers;  // null: no other processes
  // Of pods that this process has left. Calls that were prepared before may still read them.
  std::vector<std::unique_ptr<Peers>> old_peers;
  std::vector<std::unique_ptr<HostBlock, FreeHost>> old_hosts;
  std::vector<std::unique_ptr<Overlap>> old_overlaps;
  std::vector<std::string> unreported_failures;  // on GPUs that the engine had before leave()
  bool is_started = false;
  std::atomic<uint64_t> generation{0};
  std::atomic<uint64_t> version{1};
  std::atomic<uint64_t> timeout_ns{600'000'000'000};
  std::atomic<int64_t> num_sms{0};
  std::atomic<int64_t> overlap_num_sms{24};

  double timeout() const { return static_cast<double>(timeout_ns) * 1e-9; }
};

// Lives until the process ends: kernels may still run when its other statics are destroyed.
Engine& engine() {
  static Engine* const instance = std::make_unique<Engine>().release();
  return *instance;
}

// The number of CTAs of a kernel. At most one for each multiprocessor, because all must run at
// once, and about as many as can share the tokens' work. Unless the user asks for more, some
// multiprocessors stay free for other kernels that wait for their peers, as NCCL's do. If two such
// kernels each filled a GPU that the other one needs, neither would end.
//
// For the same reason the kernels of both lanes fit on a GPU together. A synchronous call leaves
// room for the starts of its program. (In a program without starts nothing is in flight when a
// synchronous call runs: a program waits for all that it has started.) So the number depends on the
// program, and not on what runs. It is the same on all ranks.
uint32_t grid_size(const Layout& layout, const LaneShare& share, const Gpu& gpu) {
  constexpr int64_t kLeast = 16;
  constexpr int64_t kSpare = 4;
  constexpr int64_t kOfToken = 8;
  const int64_t most = std::max<int64_t>(gpu.num_sms - kSpare, 1);
  const int64_t of_starts = std::min<int64_t>(engine().overlap_num_sms, most);
  int64_t ctas = 0;
  if (share.lane == kOverlap) {
    ctas = share.num_sms > 0 ? std::min(share.num_sms, most) : of_starts;
  } else {
    const int64_t asked = engine().num_sms;
    const int64_t both_lanes = asked > 0 ? gpu.num_sms : most;
    ctas = asked > 0 ? std::min(asked, both_lanes) : both_lanes;
    if (share.starts_num_sms != LaneShare::kNoStarts) {
      const int64_t room = std::min(std::max(share.starts_num_sms, of_starts), most);
      ctas = std::min(ctas, std::max<int64_t>(both_lanes - room, 1));
    }
  }
  return static_cast<uint32_t>(std::min(ctas, std::max(kLeast, kOfToken * layout.num_tokens)));
}

// With the engine locked. OK: no exchange on the GPU has failed.
Status locked_failure_of(const HostBlock& host) {
  if (!has_failure(host)) return {};
  const Peers* const peers = engine().peers.get();
  return to_status(host.failure, engine().timeout(),
                   peers != nullptr ? peers->who(host.failure.peer_gpu) : "");
}

// With the engine locked. The error of a failure that it has not returned before; empty: none.
std::string new_failure() {
  for (auto& [number, gpu] : engine().gpus) {
    if (gpu.is_failure_reported) continue;
    const Status status = locked_failure_of(*gpu.host);
    gpu.is_failure_reported = !status.ok();
    if (gpu.is_failure_reported) return status.message;
  }
  return "";
}

Status not_connected(int64_t gpu) {
  return {Code::kInternal,
          "freeio_jax: GPU " + std::to_string(gpu) +
              " of the mesh is not connected: freeio_jax.shutdown() was called, or "
              "it was not there when the engine started."};
}

// Makes these the GPUs of this process.
void take_gpus(std::map<int, Gpu> gpus) {
  engine().gpus = std::move(gpus);
  for (const auto& [number, gpu] : engine().gpus) engine().hosts[number] = gpu.host.get();
  engine().is_started = true;
  ++engine().generation;
  outdate_calls();
}

// Whether at least one of these GPUs is in this process, and none that is has had a failure. Empty:
// all GPUs of this process.
bool are_fine(const std::vector<int64_t>& gpus) {
  bool has_own = false;
  bool fine = true;
  const auto look = [&](size_t number) {
    const HostBlock* const host = number < kMaxRanks ? engine().hosts[number].load() : nullptr;
    has_own |= host != nullptr;
    fine &= host == nullptr || !has_failure(*host);
  };
  for (const int64_t number : gpus) look(static_cast<size_t>(number));
  for (size_t number = 0; gpus.empty() && number < kMaxRanks; ++number) look(number);
  return has_own && fine;
}

}  // namespace

void set_timeout(double seconds) {
  std::lock_guard lock(engine().mutex);
  // At least 1: in a GPU block 0 means "not copied from the host yet".
  engine().timeout_ns = std::max<uint64_t>(1, static_cast<uint64_t>(std::min(seconds, 1e9) * 1e9));
  for (auto& [number, gpu] : engine().gpus) {
    *const_cast<volatile uint64_t*>(&gpu.host->timeout_ns) = engine().timeout_ns;
  }
}

uint64_t generation() { return engine().generation; }

double timeout() { return engine().timeout(); }

uint64_t engine_version() { return engine().version; }

void outdate_calls() { ++engine().version; }

Status failure_of(const HostBlock& host) {
  std::lock_guard lock(engine().mutex);
  return locked_failure_of(host);
}

void set_num_sms(int64_t num_sms) {
  engine().num_sms = num_sms;
  outdate_calls();
}

void set_overlap_num_sms(int64_t num_sms) {
  engine().overlap_num_sms = std::max<int64_t>(num_sms, 1);
  outdate_calls();
}

MemoryUse memory_use() {
  std::lock_guard lock(engine().mutex);
  MemoryUse memory;
  for (const auto& [number, gpu] : engine().gpus) {
    memory.owned_bytes = std::max(memory.owned_bytes, static_cast<int64_t>(gpu.block.bytes));
  }
  if (engine().peers != nullptr) {
    memory.mapped_bytes = static_cast<int64_t>(engine().peers->mapped_bytes());
  }
  return memory;
}

Status start(const std::vector<int>& ordinals) {
  RelaxedCapture relaxed;
  std::lock_guard lock(engine().mutex);
  if (engine().is_started) return {};
  std::map<int, int> numbers;
  for (const int ordinal : ordinals) numbers[static_cast<int>(numbers.size())] = ordinal;
  std::map<int, Gpu> gpus;
  Status status =
      make_gpus(numbers, static_cast<int>(numbers.size()), false, engine().timeout_ns, gpus);
  if (!status.ok()) return status;
  take_gpus(std::move(gpus));
  return {};
}

Status join(pod::Pod& pod, int process, const std::vector<PodGpu>& pod_gpus) {
  RelaxedCapture relaxed;
  std::map<int, int> numbers, processes;
  int num_gpus = 0;
  for (const PodGpu& gpu : pod_gpus) {
    num_gpus = std::max(num_gpus, gpu.number + 1);
    if (gpu.process == process) numbers[gpu.number] = gpu.ordinal;
    processes[gpu.number] = gpu.process;
  }
  std::map<int, Gpu> gpus;
  Status status = make_gpus(numbers, num_gpus, true, engine().timeout_ns, gpus);
  if (!status.ok()) return status;
  std::vector<OwnGpu> own;
  for (const auto& [number, gpu] : gpus) {
    own.push_back({number, gpu.ordinal, gpu.block.get(), gpu.block.block_bytes, gpu.host.get(),
                   &gpu.block.allocation, gpu.block.bytes});
  }
  auto peers = std::make_unique<Peers>(pod, process, std::move(processes), std::move(own));
  Peers* const connecting = peers.get();
  {
    std::lock_guard lock(engine().mutex);
    take_gpus(std::move(gpus));
    engine().peers = std::move(peers);
  }
  // The engine is not locked meanwhile, so that other threads can read its state.
  return connecting->connect(engine().timeout());
}

Status leave() {
  RelaxedCapture relaxed;
  std::lock_guard lock(engine().mutex);
  if (engine().peers == nullptr) return {};
  for (const auto& [number, gpu] : engine().gpus) {
    CurrentDevice current(gpu.ordinal);
    // This ends: a kernel waits for its peers until the time-out at most.
    Status status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (!status.ok()) return status;
  }
  for (std::string failure = new_failure(); !failure.empty(); failure = new_failure()) {
    engine().unreported_failures.push_back(std::move(failure));
  }
  engine().peers->release();
  engine().old_peers.push_back(std::move(engine().peers));
  for (auto& [number, gpu] : engine().gpus) {
    engine().hosts[number] = nullptr;
    engine().old_hosts.push_back(std::move(gpu.host));
    engine().old_overlaps.push_back(std::move(gpu.overlap));
  }
  engine().gpus.clear();
  engine().is_started = false;
  outdate_calls();
  return {};
}

Status state_of(const std::vector<int64_t>& gpus) {
  if (are_fine(gpus)) return {};
  std::lock_guard lock(engine().mutex);
  std::vector<int64_t> numbers = gpus;
  if (gpus.empty()) {
    for (const auto& [number, gpu] : engine().gpus) numbers.push_back(number);
  }
  int64_t missing = -1;
  bool has_own = false;
  Status state;
  for (const int64_t number : numbers) {
    const auto own = engine().gpus.find(static_cast<int>(number));
    if (own == engine().gpus.end()) {
      missing = std::max(missing, number);
      continue;
    }
    has_own = true;
    const HostBlock& host = *own->second.host;
    Status status = locked_failure_of(host);
    // The cause is more useful than the error of a rank whose peer gave up because of it.
    if (!status.ok() && (state.ok() || host.failure.step != kPeerGaveUp)) state = std::move(status);
  }
  return has_own ? state : not_connected(missing);
}

Status find_gpu(int ordinal, Connection& connection) {
  std::lock_guard lock(engine().mutex);
  connection = {};
  for (const auto& [number, gpu] : engine().gpus) {
    if (gpu.ordinal != ordinal) continue;
    connection.host = gpu.host.get();
    connection.overlap = gpu.overlap.get();
    return {};
  }
  return {Code::kInternal, "freeio_jax: CUDA device " + std::to_string(ordinal) +
                               " is not connected: freeio_jax.shutdown() was called, or it was not "
                               "there when the engine started."};
}

Status find_group(const Layout& layout, const GroupMember& member, const LaneShare& share,
                  Exchange& exchange, Connection& connection) {
  std::lock_guard lock(engine().mutex);
  connection = {};
  Peers* const peers = engine().peers.get();
  for (size_t rank = 0; rank < member.gpus.size(); ++rank) {
    const int number = member.gpus[rank];
    if (number < 0) {
      return {Code::kInvalidArgument,
              "freeio_jax: rank " + std::to_string(rank) +
                  " is on another host, with which this engine does not exchange rows: the expert "
                  "axis must lie within a host."};
    }
    const auto own = engine().gpus.find(number);
    const bool is_own = own != engine().gpus.end();
    GpuBlock* block = is_own             ? own->second.block.get()
                      : peers != nullptr ? peers->block(number)
                                         : nullptr;
    if (block == nullptr) return not_connected(number);
    exchange.gpu_block[rank] = block;
    exchange.gpu[rank] = number;
    if (!is_own) connection.peers = peers;
    if (static_cast<int>(rank) == member.rank) {
      exchange.host = own->second.host.get();
      exchange.block_bytes = own->second.block.block_bytes;
      connection.overlap = own->second.overlap.get();
      connection.num_ctas = grid_size(layout, share, own->second);
#ifdef FREEIO_STAMPS
      exchange.timelines = own->second.timelines_of(share.lane);
#endif
    }
  }
  exchange.lane = share.lane;
  for (size_t rank = 0; rank < member.gpus.size(); ++rank) {
    exchange.gpu_block[rank] =
        block_of_lane(exchange.gpu_block[rank], share.lane, exchange.block_bytes);
  }
  connection.host = exchange.host;
  exchange.expected_device = member.mesh_device;
  exchange.rank = member.rank;
  exchange.num_ranks = static_cast<int32_t>(layout.num_ranks);
  exchange.ranks = Divisor(exchange.num_ranks);
  exchange.local_experts = Divisor(static_cast<int32_t>(layout.experts_per_rank()));
  exchange.num_tokens = static_cast<int32_t>(layout.num_tokens);
  exchange.top_k = static_cast<int32_t>(layout.top_k);
  exchange.num_experts = static_cast<int32_t>(layout.num_experts);
  exchange.capacity = static_cast<int32_t>(layout.capacity);
  exchange.alignment = Divisor(static_cast<int32_t>(layout.alignment));
  exchange.zero_tail = layout.zero_tail != 0;
  return {};
}

#ifdef FREEIO_STAMPS
Status take_timelines(int ordinal, std::vector<Timeline>& timelines) {
  std::lock_guard lock(engine().mutex);
  timelines.clear();
  for (const auto& [number, gpu] : engine().gpus) {
    if (gpu.ordinal != ordinal) continue;
    CurrentDevice current(ordinal);
    std::vector<Timeline> all(gpu.num_sms);
    const size_t bytes = sizeof(Timeline) * all.size();
    Timeline* const memory = gpu.timelines_of(kSynchronous);
    Status status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (status.ok()) {
      status =
          cuda_status(cudaMemcpyAsync(all.data(), memory, bytes, cudaMemcpyDeviceToHost, nullptr),
                      "cudaMemcpyAsync");
    }
    if (status.ok()) status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (status.ok()) status = cuda_status(cudaMemset(memory, 0, bytes), "cudaMemset");
    if (!status.ok()) return status;
    for (const Timeline& timeline : all) {
      if (timeline.end != 0) timelines.push_back(timeline);
    }
    return {};
  }
  return {Code::kInvalidArgument, "freeio_jax: the engine has no GPU with the CUDA ordinal " +
                                      std::to_string(ordinal) + "; make an exchange on it first."};
}
#endif

std::string take_failure() {
  std::lock_guard lock(engine().mutex);
  if (!engine().unreported_failures.empty()) {
    std::string failure = std::move(engine().unreported_failures.back());
    engine().unreported_failures.pop_back();
    return failure;
  }
  return new_failure();
}

std::string take_note() {
  std::lock_guard lock(engine().mutex);
  for (auto& [number, gpu] : engine().gpus) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t word = const_cast<const volatile uint64_t&>(gpu.host->wait[lane]);
      Wait wait;
      std::memcpy(&wait, &word, sizeof(wait));
      KnownWait& known = gpu.waits[lane];
      // A wait that is shorter than the last one is a new wait.
      if (wait.ticks < known.last.ticks || known.next_note == 0) {
        known.next_note = patience_in_seconds();
      }
      const bool goes_on = wait.ticks != known.last.ticks;
      known.last = wait;
      const int seconds = seconds_of(wait);
      if (!goes_on || seconds < known.next_note) continue;
      known.next_note = 2.0 * seconds;
      const Peers* const peers = engine().peers.get();
      return to_note(wait, engine().timeout(), peers != nullptr ? peers->who(wait.peer_gpu) : "");
    }
  }
  return "";
}

int gpu_number(int ordinal) {
  std::lock_guard lock(engine().mutex);
  for (const auto& [number, gpu] : engine().gpus) {
    if (gpu.ordinal == ordinal) return number;
  }
  return -1;
}

}  // namespace freeio::cuda
