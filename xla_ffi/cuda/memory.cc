#include "cuda/memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>
#include <utility>

namespace freeio::cuda {
namespace {

// The functions of the driver. `status` is an error if one of them is missing.
struct Driver {
  decltype(&cuGetErrorString) get_error_string = nullptr;
  decltype(&cuMemGetAllocationGranularity) get_granularity = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemRetainAllocationHandle) retain = nullptr;
  decltype(&cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAddressRange) get_range = nullptr;
  decltype(&cuPointerGetAttribute) get_attribute = nullptr;
  Status status;

  Driver() {
    look_up("cuGetErrorString", get_error_string);
    look_up("cuMemGetAllocationGranularity", get_granularity);
    look_up("cuMemCreate", create);
    look_up("cuMemRelease", release);
    look_up("cuMemRetainAllocationHandle", retain);
    look_up("cuMemExportToShareableHandle", export_handle);
    look_up("cuMemImportFromShareableHandle", import_handle);
    look_up("cuMemAddressReserve", reserve);
    look_up("cuMemAddressFree", free);
    look_up("cuMemMap", map);
    look_up("cuMemUnmap", unmap);
    look_up("cuMemSetAccess", set_access);
    look_up("cuMemGetAddressRange", get_range);
    look_up("cuPointerGetAttribute", get_attribute);
  }

 private:
  template <typename Function>
  void look_up(const char* name, Function& function) {
    constexpr unsigned kVersion = 11020;  // of the signatures in this file
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
    if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) {
      function = reinterpret_cast<Function>(found);
    } else if (status.ok()) {
      status = {Code::kInternal, std::string("freeio_jax: NVIDIA's driver has no ") + name +
                                     ", which several processes need to share memory."};
    }
  }
};

const Driver& driver() {
  static const Driver instance;
  return instance;
}

Status driver_status(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return {};
  const char* text = nullptr;
  if (driver().get_error_string(result, &text) != CUDA_SUCCESS) text = nullptr;
  return {Code::kInternal, std::string("freeio_jax: ") + call + ": " +
                               (text != nullptr ? text : std::to_string(result)) + "."};
}

CUmemAllocationProp shared_memory_on(int ordinal) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = ordinal;
  return properties;
}

}  // namespace

Allocation::Allocation(Allocation&& other) noexcept
    : handle_(other.handle_), is_held_(std::exchange(other.is_held_, false)) {}

Allocation& Allocation::operator=(Allocation&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(is_held_, other.is_held_);
  return *this;
}

Allocation::~Allocation() {
  if (is_held_) driver().release(handle_);
}

Status Allocation::create(int ordinal, size_t& bytes, Allocation& made) {
  if (!driver().status.ok()) return driver().status;
  const CUmemAllocationProp properties = shared_memory_on(ordinal);
  size_t granularity = 0;
  Status status = driver_status(
      driver().get_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
      "cuMemGetAllocationGranularity");
  if (!status.ok()) return status;
  bytes = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle handle = 0;
  status = driver_status(driver().create(&handle, bytes, &properties, 0),
                         "cuMemCreate of memory for several processes");
  if (!status.ok()) return status;
  made.handle_ = handle;
  made.is_held_ = true;
  return {};
}

Status Allocation::import(const pod::UniqueFd& file, Allocation& made) {
  if (!driver().status.ok()) return driver().status;
  CUmemGenericAllocationHandle handle = 0;
  // The driver takes the descriptor itself where it expects a pointer.
  Status status = driver_status(
      driver().import_handle(&handle, reinterpret_cast<void*>(static_cast<uintptr_t>(file.get())),
                             CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
      "cuMemImportFromShareableHandle");
  if (!status.ok()) return status;
  made.handle_ = handle;
  made.is_held_ = true;
  return {};
}

Status Allocation::behind(const void* pointer, Allocation& found) {
  if (!driver().status.ok()) return driver().status;
  CUmemGenericAllocationHandle handle = 0;
  Status status = driver_status(driver().retain(&handle, const_cast<void*>(pointer)),
                                "cuMemRetainAllocationHandle");
  if (!status.ok()) return status;
  found.handle_ = handle;
  found.is_held_ = true;
  return {};
}

Status Allocation::export_to(pod::UniqueFd& file) const {
  int descriptor = -1;
  Status status = driver_status(
      driver().export_handle(&descriptor, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
      "cuMemExportToShareableHandle");
  if (status.ok()) file = pod::UniqueFd(descriptor);
  return status;
}

Mapping::Mapping(Mapping&& other) noexcept
    : base_(std::exchange(other.base_, 0)),
      bytes_(other.bytes_),
      is_mapped_(std::exchange(other.is_mapped_, false)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  std::swap(is_mapped_, other.is_mapped_);
  return *this;
}

Mapping::~Mapping() {
  if (is_mapped_) driver().unmap(base_, bytes_);
  if (base_ != 0) driver().free(base_, bytes_);
}

Status Mapping::make(const Allocation& allocation, size_t bytes, const std::vector<int>& ordinals,
                     Mapping& made) {
  Mapping mapping;
  CUdeviceptr base = 0;
  Status status = driver_status(driver().reserve(&base, bytes, 0, 0, 0),
                                "cuMemAddressReserve for a peer's memory");
  if (!status.ok()) return status;
  mapping.base_ = base;
  mapping.bytes_ = bytes;
  status = driver_status(driver().map(base, bytes, 0, allocation.handle(), 0), "cuMemMap");
  if (!status.ok()) return status;
  mapping.is_mapped_ = true;
  std::vector<CUmemAccessDesc> access;
  for (const int ordinal : ordinals) {
    CUmemAccessDesc one = {};
    one.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    one.location.id = ordinal;
    one.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    access.push_back(one);
  }
  status = driver_status(driver().set_access(base, bytes, access.data(), access.size()),
                         "cuMemSetAccess (can these GPUs reach each other's memory?)");
  if (status.ok()) made = std::move(mapping);
  return status;
}

Status range_of(const void* pointer, AddressRange& range) {
  if (!driver().status.ok()) return driver().status;
  CUdeviceptr base = 0;
  Status status =
      driver_status(driver().get_range(&base, &range.bytes, reinterpret_cast<CUdeviceptr>(pointer)),
                    "cuMemGetAddressRange");
  range.base = base;
  return status;
}

Status allocation_id_of(const void* pointer, uint64_t& allocation_id) {
  if (!driver().status.ok()) return driver().status;
  unsigned long long id = 0;
  Status status = driver_status(driver().get_attribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID,
                                                       reinterpret_cast<CUdeviceptr>(pointer)),
                                "cuPointerGetAttribute(BUFFER_ID)");
  allocation_id = id;
  return status;
}

}  // namespace freeio::cuda
