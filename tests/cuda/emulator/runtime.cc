#include "runtime.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <utility>

#include "driver.h"
#include "kernel_table.h"
#include "machine.h"

// The null stream of a GPU is XLA's.
struct CUstream_st {
  int number;  // the machine's
  int gpu;
  bool has_priority;
};
struct CUevent_st : emulator::Event {};

namespace emulator {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kDefaultSharedBytes = 48 << 10;

int device_count = kMaxGpus;
int multiprocessors = 4;
size_t shared_bytes_of_gpu = 227 << 10;
size_t last_shared_bytes = 0;  // of the kernel that was launched last
std::atomic<bool> capturing{false};
bool native_atomics = true;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local int current_device = 0;
cudaError_t last_error = cudaSuccess;
std::string machine_error;
std::map<const void*, size_t> max_shared_bytes;
bool peer_access[kMaxGpus][kMaxGpus];

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// For calls that cannot be captured.
bool spoils_capture() { return capturing && capture_mode != cudaStreamCaptureModeRelaxed; }

bool is_device(int device) { return device >= 0 && device < device_count; }

cudaError_t run_stream(int stream) {
  const std::string error = run(stream);
  if (!error.empty()) machine_error = error;
  return result(error.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

constexpr int kGreatestPriority = -5;

int number_of(cudaStream_t stream) { return stream != nullptr ? stream->number : current_device; }

cudaError_t make_stream(cudaStream_t* stream, bool has_priority) {
  static std::atomic<int> last{kMaxGpus};
  *stream = new CUstream_st{++last, current_device, has_priority};
  return cudaSuccess;
}

cudaError_t allocate(void** pointer, size_t bytes) {
  if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
  *pointer = aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (*pointer == nullptr) return result(cudaErrorMemoryAllocation);
  // Not all of a GPU block, which may have a gigabyte, and which the engine zeroes at once.
  constexpr size_t kMostGarbage = size_t{1} << 24;
  memset(*pointer, 0xa5, std::min(bytes, kMostGarbage));
  return cudaSuccess;
}

// Sets bytes as memset does. It zeros whole pages by returning them to the system: a GPU block has
// up to 150 MB, and tests use little of it.
void set_bytes(std::byte* bytes, int value, size_t size) {
  constexpr size_t kPage = 4096;
  std::byte* const pages = bytes + -reinterpret_cast<uintptr_t>(bytes) % kPage;
  std::byte* const end = bytes + size;
  if (value == 0 && pages < end && static_cast<size_t>(end - pages) >= kPage) {
    const size_t whole = static_cast<size_t>(end - pages) / kPage * kPage;
    // The first call works only for memory that processes share, the second for all other memory.
    if (madvise(pages, whole, MADV_REMOVE) == 0 || madvise(pages, whole, MADV_DONTNEED) == 0) {
      memset(bytes, 0, static_cast<size_t>(pages - bytes));
      memset(pages + whole, 0, static_cast<size_t>(end - pages) - whole);
      return;
    }
  }
  memset(bytes, value, size);
}

}  // namespace

void set_devices(int count, int multiprocessors_of_each) {
  device_count = count;
  multiprocessors = multiprocessors_of_each;
  set_multiprocessors(static_cast<unsigned>(multiprocessors_of_each));
}

void set_shared_bytes(size_t bytes) { shared_bytes_of_gpu = bytes; }
size_t shared_bytes_of_last_launch() { return last_shared_bytes; }

void set_capturing(bool is_capturing) { capturing = is_capturing; }

void set_native_atomics(bool are_native) { native_atomics = are_native; }

cudaError_t launch_kernel(const void* function, unsigned ctas, unsigned threads, void** arguments,
                          size_t shared_bytes, cudaStream_t stream, cudaEvent_t begun) {
  if (stream != nullptr && stream->gpu != current_device) return result(cudaErrorInvalidValue);
  if (!machine_error.empty()) return result(cudaErrorLaunchFailure);
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, function);
  if (threads > 1024 || ctas == 0 || threads == 0 ||
      shared_bytes > static_cast<size_t>(attributes.maxDynamicSharedSizeBytes)) {
    return result(cudaErrorInvalidValue);
  }
  if (ctas > static_cast<unsigned>(multiprocessors)) {
    return result(cudaErrorCooperativeLaunchTooLarge);
  }
  Launch launch;
  launch.gpu = current_device;
  launch.ctas = ctas;
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  last_shared_bytes = shared_bytes;
  launch.call = bind_kernel(function, arguments[0]);
  launch.has_priority = stream != nullptr && stream->has_priority;
  launch.begun = begun;
  if (launch.call == nullptr) return result(cudaErrorInvalidDeviceFunction);
  enqueue(number_of(stream), std::move(launch));
  return cudaSuccess;
}

std::string synchronize() { return run_stream(-1) == cudaSuccess ? std::string() : machine_error; }

}  // namespace emulator

using namespace emulator;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return machine_error.c_str();
    case cudaErrorInvalidDeviceFunction:
      return "the emulator's table lacks this kernel";
    case cudaErrorCooperativeLaunchTooLarge:
      return "more CTAs than multiprocessors: not all would run at once";
    case cudaErrorPeerAccessAlreadyEnabled:
      return "peer access is already enabled";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorInvalidValue:
      break;
  }
  return "invalid argument";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(shared_bytes_of_gpu);
      return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceCanAccessPeer(int* possible, int device, int peer) {
  if (!is_device(device) || !is_device(peer)) return result(cudaErrorInvalidDevice);
  *possible = device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr attribute, int device,
                                      int peer) {
  if (!is_device(device) || !is_device(peer)) return result(cudaErrorInvalidDevice);
  if (attribute != cudaDevP2PAttrNativeAtomicSupported) return result(cudaErrorInvalidValue);
  *value = native_atomics && device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  if (flags != 0 || peer == current_device) return result(cudaErrorInvalidValue);
  if (!is_device(peer)) return result(cudaErrorInvalidDevice);
  bool& enabled = peer_access[current_device][peer];
  if (enabled) return result(cudaErrorPeerAccessAlreadyEnabled);
  enabled = true;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  return spoils_capture() ? result(cudaErrorStreamCaptureUnsupported) : run_stream(-1);
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes); }

cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes);
}

cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
  set_bytes(static_cast<std::byte*>(pointer), value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (stream != nullptr) {
    // A copy engine copies while kernels run. Any thread may call this.
    memcpy(to, from, bytes);
    return cudaSuccess;
  }
  Launch copy;
  copy.gpu = current_device;
  copy.takes_multiprocessors = false;
  copy.call = [=] { memcpy(to, from, bytes); };
  enqueue(current_device, std::move(copy));
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return make_stream(stream, false);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = kGreatestPriority;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  if (priority > 0 || priority < kGreatestPriority) return result(cudaErrorInvalidValue);
  return make_stream(stream, priority == kGreatestPriority);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return stream != nullptr ? cudaSuccess : run_stream(current_device);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  if (flags != 0) return result(cudaErrorInvalidValue);
  wait(number_of(stream), *event);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (flags != cudaEventDisableTiming) return result(cudaErrorInvalidValue);
  *event = new CUevent_st;
  return cudaSuccess;
}

// CUDA lets what waits for the event go on. The machine keeps it, as its streams may still name it.
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  record(number_of(stream), *event);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return event->happened == event->recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const auto bytes = max_shared_bytes.find(function);
  const size_t most = bytes == max_shared_bytes.end() ? kDefaultSharedBytes : bytes->second;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(most);
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > shared_bytes_of_gpu) {
    return result(cudaErrorInvalidValue);
  }
  max_shared_bytes[function] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  return launch_kernel(function, grid.x, block.x, arguments, shared_bytes, stream, nullptr);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12030;
  return cudaSuccess;
}

// A kernel's function is the address of its symbol.
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* symbol) {
  *function = static_cast<cudaFunction_t>(const_cast<void*>(symbol));
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = find_driver_function(name);
  *found = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
