// A custom call that launches an empty kernel. With it the benchmark measures how much of a call's
// time XLA and the driver need, without the engine.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::cuda {

// A capsule for jax.ffi.register_ffi_target. The call has one operand, one result, and the int64
// attribute `ctas`.
pybind11::capsule nothing_handler();

}  // namespace freeio::cuda
