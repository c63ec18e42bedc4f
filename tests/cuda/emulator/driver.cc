// The emulated driver. Physical memory is a memfd, an exported handle is a duplicate of its
// descriptor, and a mapping is an mmap. So processes share memory as they do on GPUs.
#include "driver.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "machine.h"
#include "runtime.h"

namespace emulator {
namespace {

constexpr size_t kGranularity = 2 << 20;

// Physical memory, as one process knows it. Freed when no handle and no mapping refers to it.
struct Physical {
  int descriptor;
  size_t bytes;
  int gpu;
  bool exportable;
  int references = 1;
};

struct Mapped {
  size_t bytes;
  CUmemGenericAllocationHandle handle;
  uint64_t number;  // never that of another mapping
};

// Guards all below. The engine maps the memory of peers on another thread than the tests'.
std::mutex mutex;
std::map<CUmemGenericAllocationHandle, Physical> physical;
std::map<CUdeviceptr, Mapped> mapped;
std::map<CUdeviceptr, size_t> reserved;

CUmemGenericAllocationHandle add(const Physical& memory) {
  static CUmemGenericAllocationHandle last = 0;
  physical.emplace(++last, memory);
  return last;
}

void drop(CUmemGenericAllocationHandle handle) {
  const auto found = physical.find(handle);
  if (--found->second.references > 0) return;
  ::close(found->second.descriptor);
  physical.erase(found);
}

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

// The mapping that an address lies in; mapped.end() if there is none.
auto find_mapping(CUdeviceptr address) {
  auto it = mapped.upper_bound(address);
  if (it == mapped.begin()) return mapped.end();
  --it;
  return address - it->first < it->second.bytes ? it : mapped.end();
}

bool is_valid(const CUmemAllocationProp& properties) {
  return properties.type == CU_MEM_ALLOCATION_TYPE_PINNED &&
         properties.location.type == CU_MEM_LOCATION_TYPE_DEVICE && properties.location.id >= 0 &&
         properties.location.id < kMaxGpus;
}

bool replace_by_nothing(CUdeviceptr address, size_t bytes) {
  return mmap(pointer(address), bytes, PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
}

}  // namespace

void* find_driver_function(const char* name) {
#define EMULATOR_ENTRY(function)                  \
  {                                               \
    #function, reinterpret_cast<void*>(&function) \
  }
  static const std::map<std::string, void*> functions = {
      EMULATOR_ENTRY(cuLaunchKernel),
      EMULATOR_ENTRY(cuLaunchKernelEx),
      EMULATOR_ENTRY(cuGetErrorString),
      EMULATOR_ENTRY(cuMemGetAllocationGranularity),
      EMULATOR_ENTRY(cuMemCreate),
      EMULATOR_ENTRY(cuMemRelease),
      EMULATOR_ENTRY(cuMemRetainAllocationHandle),
      EMULATOR_ENTRY(cuMemExportToShareableHandle),
      EMULATOR_ENTRY(cuMemImportFromShareableHandle),
      EMULATOR_ENTRY(cuMemAddressReserve),
      EMULATOR_ENTRY(cuMemAddressFree),
      EMULATOR_ENTRY(cuMemMap),
      EMULATOR_ENTRY(cuMemUnmap),
      EMULATOR_ENTRY(cuMemSetAccess),
      EMULATOR_ENTRY(cuMemGetAddressRange),
      EMULATOR_ENTRY(cuPointerGetAttribute),
  };
#undef EMULATOR_ENTRY
  const auto found = functions.find(name);
  return found == functions.end() ? nullptr : found->second;
}

}  // namespace emulator

using namespace emulator;

CUresult cuGetErrorString(CUresult error, const char** text) {
  switch (error) {
    case CUDA_SUCCESS:
      *text = "no error";
      return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_VALUE:
      *text = "invalid argument";
      return CUDA_SUCCESS;
    case CUDA_ERROR_OUT_OF_MEMORY:
      *text = "out of memory";
      return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_DEVICE:
      *text = "invalid device ordinal";
      return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_HANDLE:
      *text = "invalid resource handle";
      return CUDA_SUCCESS;
    case CUDA_ERROR_NOT_FOUND:
      *text = "named symbol not found";
      return CUDA_SUCCESS;
    case CUDA_ERROR_NOT_SUPPORTED:
      *text = "operation not supported";
      return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags) {
  const std::lock_guard lock(mutex);
  if (!is_valid(*properties)) return CUDA_ERROR_INVALID_VALUE;
  *granularity = kGranularity;
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  const std::lock_guard lock(mutex);
  if (!is_valid(*properties) || flags != 0 || bytes == 0 || bytes % kGranularity != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int descriptor = memfd_create("emulated GPU", MFD_CLOEXEC);
  if (descriptor < 0) return CUDA_ERROR_OUT_OF_MEMORY;
  if (ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) {
    ::close(descriptor);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  const bool exportable = properties->requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE;
  *handle = add({descriptor, bytes, properties->location.id, exportable});
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  const std::lock_guard lock(mutex);
  if (physical.count(handle) == 0) return CUDA_ERROR_INVALID_HANDLE;
  drop(handle);
  return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  const std::lock_guard lock(mutex);
  const auto found = find_mapping(reinterpret_cast<CUdeviceptr>(address));
  if (found == mapped.end()) return CUDA_ERROR_INVALID_VALUE;
  *handle = found->second.handle;
  ++physical.at(*handle).references;
  return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  const std::lock_guard lock(mutex);
  const auto found = physical.find(handle);
  if (found == physical.end()) return CUDA_ERROR_INVALID_HANDLE;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || flags != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!found->second.exportable) return CUDA_ERROR_NOT_SUPPORTED;
  const int descriptor = dup(found->second.descriptor);
  memcpy(shareable, &descriptor, sizeof(descriptor));
  return descriptor < 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* shareable,
                                        CUmemAllocationHandleType type) {
  const std::lock_guard lock(mutex);
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
  struct stat file;
  const int descriptor = dup(static_cast<int>(reinterpret_cast<intptr_t>(shareable)));
  if (descriptor < 0) return CUDA_ERROR_INVALID_VALUE;
  if (fstat(descriptor, &file) != 0 || file.st_size == 0) {
    ::close(descriptor);
    return CUDA_ERROR_INVALID_VALUE;
  }
  constexpr int kElsewhere = -1;
  *handle = add({descriptor, static_cast<size_t>(file.st_size), kElsewhere, true});
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t alignment,
                             CUdeviceptr wished, unsigned long long flags) {
  const std::lock_guard lock(mutex);
  if (bytes == 0 || bytes % kGranularity != 0 || wished != 0 || flags != 0 ||
      alignment > kGranularity) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  // Aligned as GPUs' addresses are.
  void* memory = mmap(nullptr, bytes + kGranularity, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const auto begin = reinterpret_cast<CUdeviceptr>(memory);
  *address = (begin + kGranularity - 1) / kGranularity * kGranularity;
  if (*address > begin) munmap(memory, *address - begin);
  if (const size_t rest = begin + kGranularity - *address; rest > 0) {
    munmap(pointer(*address + bytes), rest);
  }
  reserved[*address] = bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto found = reserved.find(address);
  if (found == reserved.end() || found->second != bytes) return CUDA_ERROR_INVALID_VALUE;
  const auto first = mapped.lower_bound(address);
  if (first != mapped.end() && first->first < address + bytes) return CUDA_ERROR_INVALID_VALUE;
  munmap(pointer(address), bytes);
  reserved.erase(found);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  const std::lock_guard lock(mutex);
  const auto memory = physical.find(handle);
  if (memory == physical.end()) return CUDA_ERROR_INVALID_HANDLE;
  auto range = reserved.upper_bound(address);
  if (range == reserved.begin()) return CUDA_ERROR_INVALID_VALUE;
  range = std::prev(range);
  if (flags != 0 || offset != 0 || bytes == 0 || bytes > memory->second.bytes ||
      address + bytes > range->first + range->second || find_mapping(address) != mapped.end()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  // No access is allowed before cuMemSetAccess.
  if (mmap(pointer(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->second.descriptor,
           0) == MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  static uint64_t mappings = 0;
  ++memory->second.references;
  mapped[address] = {bytes, handle, ++mappings};
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto found = mapped.find(address);
  if (found == mapped.end() || found->second.bytes != bytes) return CUDA_ERROR_INVALID_VALUE;
  if (!replace_by_nothing(address, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  drop(found->second.handle);
  mapped.erase(found);
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc* access,
                        size_t count) {
  const std::lock_guard lock(mutex);
  const auto found = mapped.find(address);
  if (found == mapped.end() || found->second.bytes != bytes || count == 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (size_t i = 0; i < count; ++i) {
    if (access[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE || access[i].location.id < 0 ||
        access[i].location.id >= kMaxGpus) {
      return CUDA_ERROR_INVALID_DEVICE;
    }
    if (access[i].flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE) return CUDA_ERROR_NOT_SUPPORTED;
  }
  return mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE) == 0 ? CUDA_SUCCESS
                                                                        : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  const std::lock_guard lock(mutex);
  const auto found = find_mapping(address);
  if (found == mapped.end()) return CUDA_ERROR_NOT_FOUND;
  if (base != nullptr) *base = found->first;
  if (bytes != nullptr) *bytes = found->second.bytes;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned, unsigned, unsigned block_x,
                        unsigned, unsigned, unsigned shared_bytes, CUstream stream,
                        void** arguments, void**) {
  const cudaError_t error =
      cudaLaunchKernel(function, dim3(grid_x), dim3(block_x), arguments, shared_bytes, stream);
  cudaGetLastError();  // the driver keeps no error
  return static_cast<CUresult>(error);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void**) {
  CUevent begun = nullptr;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT) {
      return CUDA_ERROR_NOT_SUPPORTED;
    }
    begun = attribute.value.launchCompletionEvent.event;
  }
  const cudaError_t error = launch_kernel(function, config->gridDimX, config->blockDimX, arguments,
                                          config->sharedMemBytes, config->hStream, begun);
  cudaGetLastError();  // the driver keeps no error
  return static_cast<CUresult>(error);
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  const std::lock_guard lock(mutex);
  const auto found = find_mapping(address);
  if (found == mapped.end()) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      memcpy(value, &found->second.number, sizeof(found->second.number));
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      memcpy(value, &physical.at(found->second.handle).gpu, sizeof(int));
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      memcpy(value, &found->first, sizeof(found->first));
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      memcpy(value, &found->second.bytes, sizeof(found->second.bytes));
      return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_VALUE;
}
