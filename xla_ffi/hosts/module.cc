#include "hosts/module.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/status.h"
#include "hosts/handlers.h"
#include "hosts/nvshmem.h"
#include "hosts/plan.h"
#include "hosts/program.h"
#include "pod/pod.h"

namespace freeio::cuda {

namespace py = pybind11;

void add_hosts_module(py::module_& native) {
  py::module_ module = native.def_submodule("hosts", "Groups that span hosts, on GPUs.");
  module.attr("built_with") = nvshmem_built_with();
  module.def(
      "join",
      [](int pe, int ordinal, std::vector<int> host_of_pe, std::vector<int> gpu_of_pe,
         int64_t part_bytes) {
        pod::Pod* const pod = pod::Pod::current();
        if (pod == nullptr) throw std::runtime_error("freeio_jax: this process is in no pod.");
        const Status status = join_hosts(
            *pod, {pe, ordinal, std::move(host_of_pe), std::move(gpu_of_pe), part_bytes});
        if (!status.ok()) throw std::runtime_error(status.message);
      },
      py::arg("pe"), py::arg("ordinal"), py::arg("host_of_pe"), py::arg("gpu_of_pe"),
      py::arg("part_bytes"), py::call_guard<py::gil_scoped_release>(),
      "Makes the symmetric memory, and waits for the other PEs, without a bound. gpu_of_pe: the "
      "number in the engine, -1 on other hosts. part_bytes: of a part of a window.");
  module.def(
      "try_network",
      [](uint64_t memory_of_xla, size_t bytes) {
        const Status status = try_network(reinterpret_cast<const void*>(memory_of_xla), bytes);
        if (!status.ok()) throw std::runtime_error(status.message);
      },
      py::arg("memory_of_xla"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>(),
      "Puts some of XLA's memory to each PE that only the network reaches, and waits for it, "
      "without a bound.");
  module.def("leave", &leave_hosts, py::call_guard<py::gil_scoped_release>(),
             "The counterpart of join(). Returns whether no process has gone without a word.");
  module.def(
      "reach",
      [] {
        const JoinedHosts* const joined = joined_hosts();
        const Reach reach = joined != nullptr ? reach_of(*joined) : Reach{};
        return py::make_tuple(reach.by_link, reach.by_network, reach.symmetric_bytes);
      },
      "PEs of other hosts whose memory this GPU writes by itself, those that it reaches by the "
      "network, and the bytes of symmetric memory on each GPU.");
  module.def("landing_bytes", &landing_bytes, py::arg("num_pes"), py::arg("num_hosts"),
             py::arg("part_bytes"), "Bytes of symmetric memory on each GPU.");
  module.def("ffi_types", &hosts_ffi_types);
  module.def("ffi_targets", &hosts_ffi_targets);
}

}  // namespace freeio::cuda
