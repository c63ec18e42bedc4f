// Host functions, and a variable, that NVSHMEM's device library refers to in code of its own for
// starting NVSHMEM. nvshmem4py starts it here, so that code never runs. The definitions are here
// because this module must load where NVSHMEM's host library is not installed.
#include <cstdio>
#include <cstdlib>

namespace {

[[noreturn]] void stop(const char* function) {
  std::fprintf(stderr, "freeio_jax: NVSHMEM's device library called %s.\n", function);
  std::abort();
}

}  // namespace

extern "C" {
int nvshmemid_hostlib_init_attr() { stop("nvshmemid_hostlib_init_attr"); }
// Of NVSHMEM 3.8.
int nvshmem_selected_device_transport = 0;
void nvshmemid_hostlib_finalize() { stop("nvshmemid_hostlib_finalize"); }
int nvshmemid_init_status() { stop("nvshmemid_init_status"); }
}
