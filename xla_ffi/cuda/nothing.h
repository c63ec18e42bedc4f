// A custom call that launches an empty kernel, for the benchmark: what XLA and the driver take for
// a call before the engine does anything.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::cuda {

// A capsule for jax.ffi.register_ffi_target. One operand, one result; attribute ctas: int64.
pybind11::capsule nothing_handler();

}  // namespace freeio::cuda
