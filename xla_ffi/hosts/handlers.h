// The handlers of groups that span hosts, for registration with XLA: as cuda/handlers.h.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::cuda {

pybind11::dict hosts_ffi_types();
pybind11::dict hosts_ffi_targets();

}  // namespace freeio::cuda
