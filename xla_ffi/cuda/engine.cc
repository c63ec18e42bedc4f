#include "cuda/engine.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <iomanip>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>

#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32,    DType::kBFloat16,
                             DType::kFloat16, DType::kFloat8E5M2, DType::kFloat8E4M3FN};
constexpr const char* kOps[] = {"dispatch", "dispatch_along", "combine", "combine_transpose"};
constexpr const char* kSignatureNames[kSignatureWords] = {
    "the operation", "the call in the program", "num_tokens",   "top_k", "num_experts", "capacity",
    "alignment",     "the number of CTAs",      "the row types"};

Status cuda_status(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  return {Code::kInternal,
          std::string("freeio_jax: ") + call + ": " + cudaGetErrorString(error) + "."};
}

// Sets the calling thread's GPU for a scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal) {
    if (cudaGetDevice(&previous_) != cudaSuccess) previous_ = -1;
    error_ = cudaSetDevice(ordinal);
  }
  ~CurrentDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_;
  cudaError_t error_;
};

struct FreeDevice {
  void operator()(void* pointer) const { cudaFree(pointer); }
};
struct FreeHost {
  void operator()(void* pointer) const { cudaFreeHost(pointer); }
};

struct Gpu {
  std::unique_ptr<ControlBlock, FreeDevice> control;
  std::unique_ptr<HostBlock, FreeHost> host;
  int num_sms = 0;
};

struct Engine {
  std::mutex mutex;
  std::map<int, Gpu> gpus;  // by CUDA ordinal
  std::atomic<uint64_t> timeout_ns{60'000'000'000};
  std::atomic<int64_t> num_sms{0};
};

// Lives until the process ends: kernels may still run when its other statics are destroyed.
Engine& engine() {
  static Engine* const instance = std::make_unique<Engine>().release();
  return *instance;
}

std::vector<const void*> all_kernels() {
  std::vector<const void*> kernels = {dispatch_function(true), dispatch_function(false)};
  for (const DType dtype : kDTypes) {
    for (const bool wide : {true, false}) {
      kernels.push_back(combine_function(dtype, wide));
      kernels.push_back(combine_transpose_function(dtype, wide));
    }
  }
  return kernels;
}

Status load_kernels() {
  for (const void* kernel : all_kernels()) {
    cudaFuncAttributes attributes;
    Status status = cuda_status(cudaFuncGetAttributes(&attributes, kernel),
                                "cudaFuncGetAttributes (the engine's kernels do not fit this GPU: "
                                "it was built for other architectures?)");
    if (!status.ok()) return status;
  }
  const auto allow = [](const void* kernel, size_t bytes) {
    return cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(bytes)),
                       "cudaFuncSetAttribute");
  };
  Status status = allow(dispatch_function(true), dispatch_shared_bytes(kMaxExperts));
  if (status.ok()) status = allow(dispatch_function(false), dispatch_shared_bytes(0));
  for (const DType dtype : kDTypes) {
    for (const bool wide : {true, false}) {
      if (status.ok()) status = allow(combine_function(dtype, wide), combine_shared_bytes(dtype));
      if (status.ok()) {
        status = allow(combine_transpose_function(dtype, wide), combine_transpose_shared_bytes());
      }
    }
  }
  return status;
}

Status make_gpu(int ordinal, uint64_t timeout_ns, Gpu& gpu) {
  CurrentDevice current(ordinal);
  Status status = cuda_status(current.error(), "cudaSetDevice");
  if (!status.ok()) return status;
  void* control = nullptr;
  status = cuda_status(cudaMalloc(&control, sizeof(ControlBlock)), "cudaMalloc (control block)");
  if (!status.ok()) return status;
  gpu.control.reset(static_cast<ControlBlock*>(control));
  status = cuda_status(cudaMemset(control, 0, sizeof(ControlBlock)), "cudaMemset");
  if (status.ok()) status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  if (!status.ok()) return status;
  void* host = nullptr;
  status = cuda_status(
      cudaHostAlloc(&host, sizeof(HostBlock), cudaHostAllocMapped | cudaHostAllocPortable),
      "cudaHostAlloc");
  if (!status.ok()) return status;
  gpu.host.reset(new (host) HostBlock{{}, timeout_ns});
  status =
      cuda_status(cudaDeviceGetAttribute(&gpu.num_sms, cudaDevAttrMultiProcessorCount, ordinal),
                  "cudaDeviceGetAttribute");
  if (!status.ok()) return status;
  return load_kernels();
}

Status connect(int from, int to) {
  int possible = 0;
  Status status =
      cuda_status(cudaDeviceCanAccessPeer(&possible, from, to), "cudaDeviceCanAccessPeer");
  if (!status.ok()) return status;
  if (possible == 0) {
    return {Code::kInternal, "freeio_jax: GPU " + std::to_string(from) +
                                 " cannot access the memory of GPU " + std::to_string(to) +
                                 ": the engine needs NVLink or PCIe peer access between all GPUs "
                                 "of the expert axis."};
  }
  CurrentDevice current(from);
  const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return {};
  }
  return cuda_status(error, "cudaDeviceEnablePeerAccess");
}

// CTAs of a kernel: one for each multiprocessor, so that all run at once, but not many more
// than have tokens.
uint32_t grid_size(const Layout& layout, const Gpu& gpu) {
  constexpr int64_t kLeast = 16;
  int64_t ctas = gpu.num_sms;
  if (const int64_t limit = engine().num_sms; limit > 0) ctas = std::min(ctas, limit);
  return static_cast<uint32_t>(std::min(ctas, std::max(kLeast, 2 * layout.num_tokens)));
}

const char* text_of(int step) {
  switch (step) {
    case kWaitSignature:
    case kWaitAddress:
      return "the beginning of the call";
    case kWaitCounts:
      return "the number of rows for each expert";
    case kWaitRoutes:
      return "the rows that its tokens get";
    case kWaitPartialSums:
      return "partial sums";
    default:
      return "the end of the call";
  }
}

// What to tell the user of a failure; the engine on this GPU runs no exchange after it.
Status to_status(const Failure& failure, double timeout) {
  std::ostringstream text;
  Code code = Code::kInternal;
  text << "freeio_jax." << kOps[failure.op] << ": rank " << failure.rank;
  switch (failure.step) {
    case kWrongDevice:
      text << " runs on mesh device " << failure.found << ", but was compiled for mesh device "
           << failure.expected
           << ". Give the mesh its devices when the call is traced: jax.set_mesh(mesh), or "
              "jax.shard_map(..., mesh=mesh).";
      break;
    case kSignatureDiffers:
      code = Code::kInvalidArgument;
      text << " and rank " << failure.peer << " differ in " << kSignatureNames[failure.word] << " ("
           << failure.expected << " and " << failure.found
           << "). All ranks of the expert axis must make the same calls in the same order.";
      break;
    case kPeerGaveUp:
      text << ": rank " << failure.peer << " gave this call up.";
      break;
    default:
      code = Code::kDeadlineExceeded;
      text << " waited " << std::setprecision(4) << timeout << " s for rank " << failure.peer
           << ", for " << text_of(failure.step)
           << ". All ranks of the expert axis must make the same calls in the same order. If a "
              "rank is only slow, allow more time with freeio_jax.config(timeout=seconds) or "
              "FREEIO_TIMEOUT.";
  }
  text
      << " It was exchange " << failure.epoch
      << " of these two GPUs; what it and later calls returned is not to be used, and this process "
         "can make no further exchange on this GPU.";
  return {code, text.str()};
}

}  // namespace

void set_timeout(double seconds) {
  std::lock_guard lock(engine().mutex);
  engine().timeout_ns = static_cast<uint64_t>(std::min(seconds, 1e9) * 1e9);
  for (auto& [ordinal, gpu] : engine().gpus) {
    *const_cast<volatile uint64_t*>(&gpu.host->timeout_ns) = engine().timeout_ns;
  }
}

void set_num_sms(int64_t num_sms) { engine().num_sms = num_sms; }

bool can_access_peer(int from, int to) {
  int possible = 0;
  return cudaDeviceCanAccessPeer(&possible, from, to) == cudaSuccess && possible != 0;
}

int64_t device_bytes() { return sizeof(ControlBlock); }

Status start(const std::vector<int>& ordinals) {
  std::lock_guard lock(engine().mutex);
  auto& gpus = engine().gpus;
  for (const int ordinal : ordinals) {
    if (ordinal < 0 || ordinal >= kMaxRanks) {
      return {Code::kInvalidArgument, "freeio_jax: CUDA device " + std::to_string(ordinal) +
                                          " is beyond the " + std::to_string(kMaxRanks) +
                                          " devices that one process can use."};
    }
    if (gpus.count(ordinal) != 0) continue;
    Gpu gpu;
    Status status = make_gpu(ordinal, engine().timeout_ns, gpu);
    for (const auto& [peer, unused] : gpus) {
      if (status.ok()) status = connect(ordinal, peer);
      if (status.ok()) status = connect(peer, ordinal);
    }
    if (!status.ok()) return status;
    gpus.emplace(ordinal, std::move(gpu));
  }
  return {};
}

Status describe(const Layout& layout, const Member& member, Exchange& exchange) {
  std::lock_guard lock(engine().mutex);
  exchange = {};
  for (size_t rank = 0; rank < member.ordinals.size(); ++rank) {
    const auto gpu = engine().gpus.find(member.ordinals[rank]);
    if (gpu == engine().gpus.end()) {
      return {Code::kInternal, "freeio_jax: CUDA device " + std::to_string(member.ordinals[rank]) +
                                   " of the mesh was not there when the engine started."};
    }
    exchange.control[rank] = gpu->second.control.get();
    exchange.ordinal[rank] = member.ordinals[rank];
    if (static_cast<int>(rank) == member.rank) exchange.host = gpu->second.host.get();
  }
  const auto* failure = const_cast<const volatile Failure*>(&exchange.host->failure);
  if (failure->step != kNone) {
    return to_status(exchange.host->failure, static_cast<double>(engine().timeout_ns) * 1e-9);
  }
  exchange.device = member.device;
  exchange.expected_device = member.mesh_device;
  exchange.rank = member.rank;
  exchange.num_ranks = static_cast<int32_t>(layout.num_ranks);
  exchange.num_tokens = static_cast<int32_t>(layout.num_tokens);
  exchange.top_k = static_cast<int32_t>(layout.top_k);
  exchange.num_experts = static_cast<int32_t>(layout.num_experts);
  exchange.capacity = static_cast<int32_t>(layout.capacity);
  exchange.alignment = static_cast<int32_t>(layout.alignment);
  exchange.signature[kNumTokens] = static_cast<uint32_t>(layout.num_tokens);
  exchange.signature[kTopK] = static_cast<uint32_t>(layout.top_k);
  exchange.signature[kNumExperts] = static_cast<uint32_t>(layout.num_experts);
  exchange.signature[kCapacity] = static_cast<uint32_t>(layout.capacity);
  exchange.signature[kAlignment] = static_cast<uint32_t>(layout.alignment);
  exchange.signature[kGrid] = grid_size(layout, engine().gpus.at(member.ordinals[member.rank]));
  return {};
}

Status launch(const void* function, const Exchange& exchange, void* params, size_t shared_bytes,
              void* stream) {
  void* arguments[] = {params};
  return cuda_status(cudaLaunchKernel(function, dim3(exchange.signature[kGrid]),
                                      dim3(static_cast<unsigned>(threads_per_cta())), arguments,
                                      shared_bytes, static_cast<cudaStream_t>(stream)),
                     "cudaLaunchKernel");
}

}  // namespace freeio::cuda
