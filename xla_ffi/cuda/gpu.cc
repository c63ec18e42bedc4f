#include "cuda/gpu.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cuda/current_device.h"
#include "cuda/kernels.h"
#include "cuda/sizes.h"

namespace freeio::cuda {
namespace {

Status load_kernels(int ordinal) {
  int of_gpu = 0;
  Status status =
      cuda_status(cudaDeviceGetAttribute(&of_gpu, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal),
                  "cudaDeviceGetAttribute");
  for_each_kernel([&](const Kernel& kernel, auto) {
    if (status.ok()) status = load_kernel(kernel, of_gpu);
  });
  return status;
}

Status allocate_block(int ordinal, const std::vector<int>& shared_by, BlockMemory& block) {
  Status status;
  if (shared_by.empty()) {
    void* memory = nullptr;
    status = cuda_status(cudaMalloc(&memory, block.bytes), "cudaMalloc (GPU blocks)");
    block.own.reset(memory);
  } else {
    status = Allocation::create(ordinal, block.bytes, block.allocation);
    if (status.ok()) {
      status = Mapping::make(block.allocation, block.bytes, shared_by, block.mapping);
    }
  }
  if (!status.ok()) return status;
  status = cuda_status(cudaMemset(block.get(), 0, block.bytes), "cudaMemset");
  if (status.ok()) status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return status;
}

// `num_gpus`: of all processes. `shared_by`: the ordinals of all GPUs of this process if other
// processes take part; else none.
Status make_gpu(int ordinal, int num_gpus, const std::vector<int>& shared_by, uint64_t timeout_ns,
                Gpu& gpu) {
  CurrentDevice current(ordinal);
  Status status = cuda_status(current.error(), "cudaSetDevice");
  if (!status.ok()) return status;
  gpu.ordinal = ordinal;
  gpu.block.block_bytes = gpu_block_bytes(num_gpus);
  gpu.block.bytes = static_cast<size_t>(owned_bytes(num_gpus));
  status = allocate_block(ordinal, shared_by, gpu.block);
  if (!status.ok()) return status;
  void* host = nullptr;
  status = cuda_status(
      cudaHostAlloc(&host, sizeof(HostBlock), cudaHostAllocMapped | cudaHostAllocPortable),
      "cudaHostAlloc");
  if (!status.ok()) return status;
  gpu.host.reset(new (host) HostBlock{{}, timeout_ns, {}, {}});
  status = Overlap::make(gpu.overlap);
  if (!status.ok()) return status;
  status =
      cuda_status(cudaDeviceGetAttribute(&gpu.num_sms, cudaDevAttrMultiProcessorCount, ordinal),
                  "cudaDeviceGetAttribute");
  if (!status.ok()) return status;
#ifdef FREEIO_STAMPS
  void* timelines = nullptr;
  const size_t bytes = sizeof(Timeline) * kLanes * gpu.num_sms;
  status = cuda_status(cudaMalloc(&timelines, bytes), "cudaMalloc (timelines)");
  gpu.timelines.reset(timelines);
  if (status.ok()) status = cuda_status(cudaMemset(timelines, 0, bytes), "cudaMemset");
  if (!status.ok()) return status;
#endif
  return load_kernels(ordinal);
}

// Whether a GPU can access the memory of another one in the way that the kernels need. They need
// atomics, and lines that arrive as a whole. The driver tells only of the atomics. NVLink has
// them, and also carries lines as a whole.
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

}  // namespace

Status load_kernel(const Kernel& kernel, int shared_bytes_of_gpu) {
  cudaFuncAttributes attributes;
  Status status = cuda_status(cudaFuncGetAttributes(&attributes, kernel.function),
                              "cudaFuncGetAttributes (the engine's kernels do not fit this GPU: it "
                              "was built for other architectures?)");
  if (!status.ok()) return status;
  // Some GPUs have less shared memory than a kernel needs for the most experts. A call that needs
  // more than there is gets an error when it is launched.
  const int most = shared_bytes_of_gpu - static_cast<int>(attributes.sharedSizeBytes);
  const auto bytes = static_cast<int>(kernel.shared_bytes);
  return cuda_status(
      cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           std::min(bytes, most)),
      "cudaFuncSetAttribute");
}

void FreeDevice::operator()(void* pointer) const { cudaFree(pointer); }
void FreeHost::operator()(void* pointer) const { cudaFreeHost(pointer); }

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
    // Peer access is enabled before the GPU block is mapped, as the driver demands.
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

bool has_link(int from, int to) {
  bool linked = false;
  return find_link(from, to, linked) == cudaSuccess && linked;
}

}  // namespace freeio::cuda
