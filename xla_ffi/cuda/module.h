// The CUDA engine's part of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::cuda {

// Adds the submodule `cuda`: starting and joining, memory, measurements, the FFI types and targets.
void add_module(pybind11::module_& native);

}  // namespace freeio::cuda
