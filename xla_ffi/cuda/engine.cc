#include "cuda/engine.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/current_device.h"
#include "cuda/failure.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "cuda/params.h"
#include "cuda/peers.h"
#include "host/deadlines.h"

namespace freeio::cuda {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32,    DType::kBFloat16,
                             DType::kFloat16, DType::kFloat8E5M2, DType::kFloat8E4M3FN};
constexpr Routes kAllRoutes[] = {Routes::kOfHandle, Routes::kByCounts, Routes::kByIds,
                                 Routes::kByIdsWithRows};

struct FreeDevice {
  void operator()(void* pointer) const { cudaFree(pointer); }
};
struct FreeHost {
  void operator()(void* pointer) const { cudaFreeHost(pointer); }
};

// Memory of a control block: of this process alone, or to be shared with others.
struct ControlMemory {
  std::unique_ptr<void, FreeDevice> own;
  Allocation allocation;
  Mapping mapping;
  size_t bytes = 0;

  ControlBlock* get() const {
    return static_cast<ControlBlock*>(own != nullptr ? own.get() : mapping.base());
  }
};

// One GPU of this process.
struct Gpu {
  int ordinal = 0;
  ControlMemory control;
  std::unique_ptr<HostBlock, FreeHost> host;
  int num_sms = 0;
  bool told = false;     // the failure, if there is one
  Wait last_wait{};      // that was looked at
  double next_note = 0;  // seconds of a wait
};

struct Engine {
  std::mutex mutex;
  std::map<int, Gpu> gpus;                   // by GPU number
  std::unique_ptr<Peers> peers;              // null: no other processes
  std::vector<std::unique_ptr<Peers>> left;  // of pods that this process is in no more
  std::vector<std::string> untold;           // failures of GPUs that are gone since
  bool started = false;
  std::atomic<uint64_t> generation{0};
  std::atomic<uint64_t> timeout_ns{600'000'000'000};
  std::atomic<int64_t> num_sms{0};

  double timeout() const { return static_cast<double>(timeout_ns) * 1e-9; }
};

// Lives until the process ends: kernels may still run when its other statics are destroyed.
Engine& engine() {
  static Engine* const instance = std::make_unique<Engine>().release();
  return *instance;
}

// With the most shared memory that any call asks for.
std::vector<Kernel> all_kernels() {
  std::vector<Kernel> kernels;
  for (const Routes routes : kAllRoutes) {
    kernels.push_back(
        {dispatch_function(routes), dispatch_shared_bytes(routes, kMaxExperts, kMaxSentByAll)});
  }
  for (const DType dtype : kDTypes) {
    if (const void* combine = combine_in_lines_function(dtype)) {
      kernels.push_back({combine, combine_in_lines_shared_bytes()});
    }
    for (const bool wide : {true, false}) {
      kernels.push_back({combine_function(dtype, wide), combine_shared_bytes()});
      kernels.push_back(
          {combine_transpose_function(dtype, wide), combine_transpose_shared_bytes()});
    }
  }
  return kernels;
}

Status load_kernels(int ordinal) {
  int of_gpu = 0;
  Status status =
      cuda_status(cudaDeviceGetAttribute(&of_gpu, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal),
                  "cudaDeviceGetAttribute");
  for (const auto& [function, shared_bytes] : all_kernels()) {
    if (!status.ok()) return status;
    cudaFuncAttributes attributes;
    status = cuda_status(cudaFuncGetAttributes(&attributes, function),
                         "cudaFuncGetAttributes (the engine's kernels do not fit this GPU: it was "
                         "built for other architectures?)");
    if (!status.ok()) return status;
    // What the most experts need, some GPUs have not: launch() tells those who need it.
    const int most = of_gpu - static_cast<int>(attributes.sharedSizeBytes);
    status = cuda_status(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              std::min(static_cast<int>(shared_bytes), most)),
                         "cudaFuncSetAttribute");
  }
  return status;
}

Status allocate_control(int ordinal, const std::vector<int>& shared_by, ControlMemory& control) {
  Status status;
  if (shared_by.empty()) {
    void* memory = nullptr;
    status = cuda_status(cudaMalloc(&memory, control.bytes), "cudaMalloc (control block)");
    control.own.reset(memory);
  } else {
    status = Allocation::create(ordinal, control.bytes, control.allocation);
    if (status.ok()) {
      status = Mapping::make(control.allocation, control.bytes, shared_by, control.mapping);
    }
  }
  if (!status.ok()) return status;
  status = cuda_status(cudaMemset(control.get(), 0, control.bytes), "cudaMemset");
  if (status.ok()) status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return status;
}

// `num_gpus`: of all processes. `shared_by`: all GPUs of this process, by ordinal, where other
// processes take part; else none.
Status make_gpu(int ordinal, int num_gpus, const std::vector<int>& shared_by, uint64_t timeout_ns,
                Gpu& gpu) {
  CurrentDevice current(ordinal);
  Status status = cuda_status(current.error(), "cudaSetDevice");
  if (!status.ok()) return status;
  gpu.ordinal = ordinal;
  gpu.control.bytes = control_bytes(num_gpus);
  status = allocate_control(ordinal, shared_by, gpu.control);
  if (!status.ok()) return status;
  void* host = nullptr;
  status = cuda_status(
      cudaHostAlloc(&host, sizeof(HostBlock), cudaHostAllocMapped | cudaHostAllocPortable),
      "cudaHostAlloc");
  if (!status.ok()) return status;
  gpu.host.reset(new (host) HostBlock{{}, timeout_ns, {}, 0});
  status =
      cuda_status(cudaDeviceGetAttribute(&gpu.num_sms, cudaDevAttrMultiProcessorCount, ordinal),
                  "cudaDeviceGetAttribute");
  if (!status.ok()) return status;
  return load_kernels(ordinal);
}

// Whether a GPU accesses another one's memory as the kernels need it: with atomics, and so that
// what a warp stores to a line arrives as one.
cudaError_t find_link(int from, int to, bool& found) {
  int access = 0, atomics = 0;
  cudaError_t error = cudaDeviceCanAccessPeer(&access, from, to);
  if (error == cudaSuccess && access != 0) {
    error = cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, from, to);
  }
  found = access != 0 && atomics != 0;
  return error;
}

Status connect(int from, int to) {
  bool linked = false;
  Status status = cuda_status(find_link(from, to, linked), "cudaDeviceGetP2PAttribute");
  if (!status.ok()) return status;
  if (!linked) {
    return {Code::kInternal, "freeio_jax: no NVLink from GPU " + std::to_string(from) + " to GPU " +
                                 std::to_string(to) +
                                 ", or peer access is off: the engine needs it between all GPUs "
                                 "of a process. Leave GPUs out with CUDA_VISIBLE_DEVICES, or use "
                                 "freeio_jax.reference."};
  }
  CurrentDevice current(from);
  const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return {};
  }
  return cuda_status(error, "cudaDeviceEnablePeerAccess");
}

// Of this process: makes their control blocks, and lets each access the others' memory.
Status make_gpus(const std::map<int, int>& ordinals, int num_gpus, bool shared, uint64_t timeout_ns,
                 std::map<int, Gpu>& gpus) {
  if (num_gpus > kMaxRanks) {
    return {Code::kInvalidArgument, "freeio_jax: the engine takes at most " +
                                        std::to_string(kMaxRanks) + " GPUs of one host."};
  }
  std::vector<int> shared_by;
  for (const auto& [number, ordinal] : ordinals) {
    if (shared) shared_by.push_back(ordinal);
  }
  for (const auto& [number, ordinal] : ordinals) {
    Gpu gpu;
    Status status;
    // Before the control block is mapped: the driver asks for it.
    for (const auto& [peer_number, peer] : gpus) {
      if (status.ok()) status = connect(ordinal, peer.ordinal);
      if (status.ok()) status = connect(peer.ordinal, ordinal);
    }
    if (status.ok()) status = make_gpu(ordinal, num_gpus, shared_by, timeout_ns, gpu);
    if (!status.ok()) return status;
    gpus.emplace(number, std::move(gpu));
  }
  return {};
}

// CTAs of a kernel: one for each multiprocessor, so that all run at once, but not many more
// than share a token. Unless all are asked for, some multiprocessors are left for other kernels
// that wait for their peers, NCCL's for instance: where each of two such kernels holds a GPU that
// the other one needs, neither ends.
uint32_t grid_size(const Layout& layout, const Gpu& gpu) {
  constexpr int64_t kLeast = 16;
  constexpr int64_t kSpare = 4;
  const int64_t asked = engine().num_sms;
  const int64_t ctas = asked > 0 ? std::min<int64_t>(asked, gpu.num_sms)
                                 : std::max<int64_t>(gpu.num_sms - kSpare, 1);
  constexpr int64_t kOfToken = 8;
  return static_cast<uint32_t>(std::min(ctas, std::max(kLeast, kOfToken * layout.num_tokens)));
}

// With the engine locked. OK: no exchange on the GPU has failed.
Status failure_of(const HostBlock& host) {
  const volatile Failure& failure = host.failure;
  if (failure.step == kNone) return {};
  const Peers* const peers = engine().peers.get();
  return to_status(host.failure, engine().timeout(),
                   peers != nullptr ? peers->who(host.failure.peer_gpu) : "");
}

// With the engine locked. A failure on any GPU that was not returned before; empty: there is none.
std::string new_failure() {
  for (auto& [number, gpu] : engine().gpus) {
    if (gpu.told) continue;
    const Status status = failure_of(*gpu.host);
    gpu.told = !status.ok();
    if (gpu.told) return status.message;
  }
  return "";
}

Status not_connected(int64_t gpu) {
  return {Code::kInternal,
          "freeio_jax: GPU " + std::to_string(gpu) +
              " of the mesh is not connected: freeio_jax.shutdown() was called, or "
              "it was not there when the engine started."};
}

// The addresses of this rank's buffers, as its peers understand them.
Status translate_addresses(Exchange& exchange) {
  Peers* peers = nullptr;
  {
    std::lock_guard lock(engine().mutex);
    for (int rank = 0; rank < exchange.num_ranks; ++rank) {
      if (engine().gpus.count(exchange.gpu[rank]) == 0) peers = engine().peers.get();
    }
  }
  if (peers == nullptr) return {};
  for (uint64_t& address : exchange.posted) {
    if (address == 0) continue;
    Status status =
        peers->share(reinterpret_cast<const void*>(address), engine().timeout(), address);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

void set_timeout(double seconds) {
  std::lock_guard lock(engine().mutex);
  // Not 0, which the kernels take for "not known yet".
  engine().timeout_ns = std::max<uint64_t>(1, static_cast<uint64_t>(std::min(seconds, 1e9) * 1e9));
  for (auto& [number, gpu] : engine().gpus) {
    *const_cast<volatile uint64_t*>(&gpu.host->timeout_ns) = engine().timeout_ns;
  }
}

uint64_t generation() { return engine().generation; }

void set_num_sms(int64_t num_sms) { engine().num_sms = num_sms; }

Memory memory() {
  std::lock_guard lock(engine().mutex);
  Memory memory;
  for (const auto& [number, gpu] : engine().gpus) {
    memory.owned_bytes = std::max(memory.owned_bytes, static_cast<int64_t>(gpu.control.bytes));
  }
  if (engine().peers != nullptr) {
    memory.mapped_bytes = static_cast<int64_t>(engine().peers->mapped_bytes());
  }
  return memory;
}

bool has_link(int from, int to) {
  bool linked = false;
  return find_link(from, to, linked) == cudaSuccess && linked;
}

Status start(const std::vector<int>& ordinals) {
  RelaxedCapture relaxed;
  std::lock_guard lock(engine().mutex);
  if (engine().started) return {};
  std::map<int, int> numbers;
  for (const int ordinal : ordinals) numbers[static_cast<int>(numbers.size())] = ordinal;
  std::map<int, Gpu> gpus;
  Status status =
      make_gpus(numbers, static_cast<int>(numbers.size()), false, engine().timeout_ns, gpus);
  if (!status.ok()) return status;
  engine().gpus = std::move(gpus);
  engine().started = true;
  ++engine().generation;
  return {};
}

Status join(host::Pod& pod, int process, const std::vector<PodGpu>& pod_gpus) {
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
    own.push_back({number, gpu.ordinal, gpu.control.get(), gpu.host.get(), &gpu.control.allocation,
                   gpu.control.bytes});
  }
  auto peers = std::make_unique<Peers>(pod, process, std::move(processes), std::move(own));
  Peers* const connecting = peers.get();
  {
    std::lock_guard lock(engine().mutex);
    engine().gpus = std::move(gpus);
    engine().peers = std::move(peers);
    engine().started = true;
    ++engine().generation;
  }
  // Not locked: a peer that dies meanwhile is heard of on another thread.
  return connecting->connect(engine().timeout());
}

Status leave() {
  RelaxedCapture relaxed;
  std::lock_guard lock(engine().mutex);
  if (engine().peers == nullptr) return {};
  for (const auto& [number, gpu] : engine().gpus) {
    CurrentDevice current(gpu.ordinal);
    // Kernels that wait for peers end, at the latest, with the time-out.
    Status status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (!status.ok()) return status;
  }
  for (std::string failure = new_failure(); !failure.empty(); failure = new_failure()) {
    engine().untold.push_back(std::move(failure));
  }
  engine().peers->release();
  engine().left.push_back(std::move(engine().peers));
  engine().gpus.clear();
  engine().started = false;
  return {};
}

Status state_of(std::vector<int64_t> gpus) {
  std::lock_guard lock(engine().mutex);
  if (gpus.empty()) {
    for (const auto& [number, gpu] : engine().gpus) gpus.push_back(number);
  }
  int64_t missing = -1;
  bool has_own = false;
  Status state;
  for (const int64_t number : gpus) {
    const auto own = engine().gpus.find(static_cast<int>(number));
    if (own == engine().gpus.end()) {
      missing = std::max(missing, number);
      continue;
    }
    has_own = true;
    const HostBlock& host = *own->second.host;
    Status status = failure_of(host);
    // Rather the cause than that a peer gave up because of it.
    if (!status.ok() && (state.ok() || host.failure.step != kPeerGaveUp)) state = std::move(status);
  }
  return has_own ? state : not_connected(missing);
}

Status describe(const Layout& layout, const Member& member, Exchange& exchange) {
  std::lock_guard lock(engine().mutex);
  exchange = {};
  const Peers* const peers = engine().peers.get();
  for (size_t rank = 0; rank < member.gpus.size(); ++rank) {
    const int number = member.gpus[rank];
    if (number < 0) {
      return {Code::kInvalidArgument,
              "freeio_jax: rank " + std::to_string(rank) +
                  " is on another host, with which this engine does not exchange rows: the expert "
                  "axis must lie within a host."};
    }
    const auto own = engine().gpus.find(number);
    ControlBlock* control = own != engine().gpus.end() ? own->second.control.get()
                            : peers != nullptr         ? peers->control(number)
                                                       : nullptr;
    if (control == nullptr) return not_connected(number);
    exchange.control[rank] = control;
    exchange.gpu[rank] = number;
    if (static_cast<int>(rank) == member.rank) exchange.host = own->second.host.get();
  }
  if (Status status = failure_of(*exchange.host); !status.ok()) return status;
  exchange.device = member.device;
  exchange.expected_device = member.mesh_device;
  exchange.rank = member.rank;
  exchange.num_ranks = static_cast<int32_t>(layout.num_ranks);
  exchange.ranks = Divisor(exchange.num_ranks);
  exchange.local_experts = Divisor(static_cast<int32_t>(layout.num_experts / layout.num_ranks));
  exchange.num_tokens = static_cast<int32_t>(layout.num_tokens);
  exchange.top_k = static_cast<int32_t>(layout.top_k);
  exchange.num_experts = static_cast<int32_t>(layout.num_experts);
  exchange.capacity = static_cast<int32_t>(layout.capacity);
  exchange.alignment = Divisor(static_cast<int32_t>(layout.alignment));
  exchange.signature[kNumTokens] = static_cast<uint32_t>(layout.num_tokens);
  exchange.signature[kTopK] = static_cast<uint32_t>(layout.top_k);
  exchange.signature[kNumExperts] = static_cast<uint32_t>(layout.num_experts);
  exchange.signature[kCapacity] = static_cast<uint32_t>(layout.capacity);
  exchange.signature[kAlignment] = static_cast<uint32_t>(layout.alignment);
  exchange.signature[kGrid] = grid_size(layout, engine().gpus.at(member.gpus[member.rank]));
  return {};
}

std::string take_failure() {
  std::lock_guard lock(engine().mutex);
  if (!engine().untold.empty()) {
    std::string failure = std::move(engine().untold.back());
    engine().untold.pop_back();
    return failure;
  }
  return new_failure();
}

std::string take_note() {
  std::lock_guard lock(engine().mutex);
  for (auto& [number, gpu] : engine().gpus) {
    const uint64_t word = *const_cast<const volatile uint64_t*>(&gpu.host->wait);
    Wait wait;
    std::memcpy(&wait, &word, sizeof(wait));
    // One that is shorter is another one.
    if (wait.ticks < gpu.last_wait.ticks || gpu.next_note == 0) {
      gpu.next_note = host::patience_in_seconds();
    }
    const bool goes_on = wait.ticks != gpu.last_wait.ticks;
    gpu.last_wait = wait;
    const int seconds = seconds_of(wait);
    if (!goes_on || seconds < gpu.next_note) continue;
    gpu.next_note = 2.0 * seconds;
    const Peers* const peers = engine().peers.get();
    return to_note(wait, engine().timeout(), peers != nullptr ? peers->who(wait.peer_gpu) : "");
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

Status launch(const void* function, Exchange& exchange, void* params, size_t shared_bytes,
              void* stream) {
  Status status = translate_addresses(exchange);
  if (!status.ok()) return status;
  void* arguments[] = {params};
  const cudaError_t error = cudaLaunchKernel(
      function, dim3(exchange.signature[kGrid]), dim3(static_cast<unsigned>(threads_per_cta())),
      arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  cudaFuncAttributes attributes;
  if (error != cudaSuccess && cudaFuncGetAttributes(&attributes, function) == cudaSuccess &&
      shared_bytes > static_cast<size_t>(attributes.maxDynamicSharedSizeBytes)) {
    cudaGetLastError();  // which is told here
    return {Code::kInvalidArgument,
            "freeio_jax: a kernel of this call, with num_experts=" +
                std::to_string(exchange.num_experts) + ", needs " + std::to_string(shared_bytes) +
                " bytes of shared memory, and this GPU has " +
                std::to_string(attributes.maxDynamicSharedSizeBytes) +
                " for it. Use a GPU that has more (A100, H100, B200), or fewer experts."};
  }
  return cuda_status(error, "cudaLaunchKernel");
}

}  // namespace freeio::cuda
