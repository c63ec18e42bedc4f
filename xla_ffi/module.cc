// The Python module freeio_jax._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/layout.h"
#include "host/handlers.h"
#include "host/rendezvous.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.doc() = "Engines of freeio_jax behind XLA FFI custom calls.";
  module.def("ffi_types", &freeio::host::ffi_types);
  module.def("ffi_targets", &freeio::host::ffi_targets);
  module.def("set_timeout", &freeio::host::set_timeout, py::arg("seconds"));
  module.def(
      "groups",
      [](int64_t num_ranks, int64_t num_experts, int64_t capacity, int64_t alignment,
         const std::vector<int64_t>& expert_load) {
        freeio::Layout layout;
        layout.num_ranks = num_ranks;
        layout.num_experts = num_experts;
        layout.capacity = capacity;
        layout.alignment = alignment;
        if (static_cast<int64_t>(expert_load.size()) != layout.experts_per_rank()) {
          throw py::value_error("expert_load must have one entry for each expert of a rank");
        }
        const freeio::Groups groups(layout, expert_load.data());
        return py::make_tuple(groups.starts, groups.sizes);
      },
      py::arg("num_ranks"), py::arg("num_experts"), py::arg("capacity"), py::arg("alignment"),
      py::arg("expert_load"), "Group starts and sizes, as the engines compute them.");
}
