// The CUDA engine's handlers, for registration with XLA.
#pragma once

#include <pybind11/pybind11.h>

#include "core/starter.h"

namespace freeio::cuda {

// What starts the engine where no call was lowered in this process.
Starter& starter();

// {name: registration} of the states of custom calls, and {target: handlers}.
pybind11::dict ffi_types();
pybind11::dict ffi_targets();

}  // namespace freeio::cuda
