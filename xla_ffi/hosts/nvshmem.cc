#include "hosts/nvshmem.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <device_host_transport/nvshmem_constants.h>
#include <dlfcn.h>
#include <non_abi/nvshmem_version.h>

#include <type_traits>

#include "cuda/current_device.h"

namespace freeio::cuda {
namespace {

// All versions of NVSHMEM 3 have this name.
constexpr const char* kLibrary = "libnvshmem_host.so.3";

Status failed(const std::string& call, int error) {
  return {Code::kInternal, "freeio_jax: " + call + " of NVSHMEM failed with status " +
                               std::to_string(error) +
                               ". NVSHMEM_DEBUG=INFO makes it say more in the log."};
}

}  // namespace

Status Nvshmem::find(Nvshmem& found) {
  // This does not load the library: nvshmem4py decides which one a process uses.
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) {
    return {Code::kInternal, std::string("freeio_jax: nvshmem4py has not loaded ") + kLibrary +
                                 ": pip install 'freeio_jax[hosts]'."};
  }
  std::string missing;
  const auto look_up = [&](const char* name, auto& function) {
    using Function = std::remove_reference_t<decltype(function)>;
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) missing = name;
  };
  look_up("nvshmemx_init_status", found.status_);
  look_up("nvshmem_align", found.allocate_);
  look_up("nvshmem_free", found.free_);
  look_up("nvshmem_ptr", found.address_);
  look_up("nvshmemx_buffer_register", found.expose_);
  look_up("nvshmemx_buffer_unregister", found.hide_);
  look_up("nvshmem_putmem", found.put_);
  look_up("nvshmem_quiet", found.quiet_);
  look_up("nvshmemx_cumodule_init", found.bind_);
  dlclose(library);  // it stays loaded: nvshmem4py holds it
  if (missing.empty()) return {};
  return {Code::kInternal, std::string("freeio_jax: ") + kLibrary + " has no function " + missing +
                               ": use another version of nvidia-nvshmem-cu13."};
}

Status Nvshmem::check_started() const {
  const int status = status_();
  if (status >= NVSHMEM_STATUS_IS_INITIALIZED) return {};
  return {Code::kInternal,
          "freeio_jax: NVSHMEM has not started, although it reported no error (its status is " +
              std::to_string(status) +
              "). Most often it reaches some GPU of another process neither by NVLink nor by a "
              "network. What it wrote to stderr says more."};
}

Status Nvshmem::allocate(size_t alignment, size_t bytes, void*& memory) const {
  memory = allocate_(alignment, bytes);
  if (memory != nullptr) return {};
  return {Code::kInternal, "freeio_jax: NVSHMEM has no " + std::to_string(bytes) +
                               " bytes of symmetric memory. Leave more of the GPU's memory free "
                               "(XLA_PYTHON_CLIENT_MEM_FRACTION), or set NVSHMEM_SYMMETRIC_SIZE."};
}

Status Nvshmem::expose(void* memory, size_t bytes) const {
  const int error = expose_(memory, bytes);
  return error == 0 ? Status{} : failed("nvshmemx_buffer_register", error);
}

Status Nvshmem::bind(const Kernel& kernel) const {
  using GetModule = CUresult (*)(CUmodule*, CUfunction);
  void* get_module = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  Status status = cuda_status(cudaGetDriverEntryPointByVersion("cuFuncGetModule", &get_module,
                                                               11000, cudaEnableDefault, &result),
                              "cudaGetDriverEntryPointByVersion");
  if (!status.ok()) return status;
  if (result != cudaDriverEntryPointSuccess) {
    return {Code::kInternal, "freeio_jax: NVIDIA's driver has no cuFuncGetModule."};
  }
  cudaFunction_t function = nullptr;
  status = cuda_status(cudaGetFuncBySymbol(&function, kernel.function), "cudaGetFuncBySymbol");
  if (!status.ok()) return status;
  CUmodule module = nullptr;
  const CUresult error =
      reinterpret_cast<GetModule>(get_module)(&module, static_cast<CUfunction>(function));
  if (error != CUDA_SUCCESS) return cuda_status(static_cast<cudaError_t>(error), "cuFuncGetModule");
  const int bound = bind_(module);
  return bound == 0 ? Status{} : failed("nvshmemx_cumodule_init", bound);
}

std::string nvshmem_built_with() {
  return std::to_string(NVSHMEM_VENDOR_MAJOR_VERSION) + "." +
         std::to_string(NVSHMEM_VENDOR_MINOR_VERSION) + "." +
         std::to_string(NVSHMEM_VENDOR_PATCH_VERSION);
}

}  // namespace freeio::cuda
