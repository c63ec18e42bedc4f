// The CUDA engine's part of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::cuda {

// Adds the submodule `cuda`, with functions to start the engine, to read its state and failures, to
// measure GPUs, and to register the engine with XLA.
void add_module(pybind11::module_& native);

}  // namespace freeio::cuda
