// The CPU engine's XLA FFI handlers.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::host {

// {type name: {"type_id": capsule, "type_info": capsule}}, as jax.ffi.register_ffi_type takes it.
pybind11::dict ffi_types();

// {target name: {stage: capsule}}, as jax.ffi.register_ffi_target takes it.
pybind11::dict ffi_targets();

}  // namespace freeio::host
