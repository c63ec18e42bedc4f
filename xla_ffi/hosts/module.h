// The transport between hosts as Python sees it.
#pragma once

#include <pybind11/pybind11.h>

namespace freeio::cuda {

void add_hosts_module(pybind11::module_& native);

}  // namespace freeio::cuda
