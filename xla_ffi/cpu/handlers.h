// The CPU engine's XLA FFI handlers.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::cpu {

// Adds to `module` what Python registers with XLA and how it starts the engine:
// `ffi_types()`: {type name: {"type_id": capsule, "type_info": capsule}}, as
// jax.ffi.register_ffi_type takes it;
// `ffi_targets()`: {target name: {stage: capsule}}, as jax.ffi.register_ffi_target takes it.
void add_engine(pybind11::module_& module);

}  // namespace freeio::cpu
