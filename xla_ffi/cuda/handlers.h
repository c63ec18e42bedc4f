// The CUDA engine's handlers, for registration with XLA.
#pragma once

#include <pybind11/pybind11.h>

#include "core/starter.h"

namespace freeio::cuda {

// Starts the engine in a process that has lowered no call.
Starter& starter();

// What jax.ffi registers: {name: registration} for the types of the states that XLA keeps for
// custom calls, and {target: {stage: handler}}.
pybind11::dict ffi_types();
pybind11::dict ffi_targets();

}  // namespace freeio::cuda
