#include "cuda/module.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "core/status.h"
#include "cuda/gpu.h"
#include "cuda/gpus.h"
#include "cuda/handlers.h"
#include "cuda/measure.h"
#include "cuda/nothing.h"
#include "cuda/overlap.h"
#include "cuda/plan.h"
#include "pod/pod.h"

namespace freeio::cuda {
namespace {

namespace py = pybind11;

// Only looks for the library. A process that has initialized CUDA can no longer fork and use CUDA
// in the child.
bool has_driver() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return false;
  dlclose(driver);
  return true;
}

void raise_unless_ok(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

}  // namespace

void add_module(py::module_& native) {
  py::module_ module = native.def_submodule("cuda", "The CUDA engine.");
  module.def(
      "max_in_flight", [] { return kMaxInFlight; },
      "The most exchanges of a GPU that a program may have started and not waited for.");
  module.def(
      "set_few_ctas", &set_few_ctas, py::arg("ctas"),
      "Sets on how many CTAs at most a large combine takes the kernel for few of them, which "
      "else is not used. For tests and measurements. All processes must have the same.");
  module.def("has_driver", &has_driver, "Whether this machine has NVIDIA's driver.");
  module.def("has_link", &has_link, py::arg("from_ordinal"), py::arg("to_ordinal"));
  module.def(
      "memory",
      [] {
        const MemoryUse bytes = memory_use();
        return py::make_tuple(bytes.owned_bytes, bytes.mapped_bytes);
      },
      "Bytes of device memory that the engine owns on each GPU, and that it has mapped of other "
      "processes.");
  module.def(
      "start", [](const std::vector<int>& ordinals) { raise_unless_ok(start(ordinals)); },
      py::arg("ordinals"), py::call_guard<py::gil_scoped_release>(),
      "Prepares this process's GPUs, by CUDA ordinal, for a program of one process.");
  module.def(
      "join",
      [](int process, const std::vector<std::tuple<int, int, int>>& gpus) {
        std::vector<PodGpu> pod_gpus;
        for (const auto& [number, owner, ordinal] : gpus) {
          pod_gpus.push_back({number, owner, ordinal});
        }
        pod::Pod* const pod = pod::Pod::current();
        if (pod == nullptr) throw std::runtime_error("freeio_jax: this process is in no pod.");
        raise_unless_ok(join(*pod, process, pod_gpus));
      },
      py::arg("process"), py::arg("gpus"), py::call_guard<py::gil_scoped_release>(),
      "Prepares this process's GPUs and connects them with those of the pod's other processes. "
      "gpus: (number, process, CUDA ordinal) of all.");
  module.def(
      "leave", [] { raise_unless_ok(leave()); }, py::call_guard<py::gil_scoped_release>(),
      "Ends the connection with the GPUs of other processes.");
  // take_failure() waits while leave() holds the engine's lock. Python must be able to run
  // meanwhile.
  module.def("take_failure", &take_failure, py::call_guard<py::gil_scoped_release>(),
             "The error of an exchange that failed, once for each GPU; empty: nothing new.");
  module.def("take_note", &take_note, py::call_guard<py::gil_scoped_release>(),
             "Which rank waits for which for a long time; empty: nothing new.");
  module.def("memory_bandwidth", &memory_bandwidth, py::arg("ordinal"), py::arg("bytes"));
  module.def("write_bandwidth", &write_bandwidth, py::arg("ordinal"), py::arg("bytes"));
  module.def("link_bandwidth", &link_bandwidth, py::arg("ordinals"), py::arg("bytes"),
             py::arg("ctas"), py::arg("pull"));
  module.def("flag_trip", &flag_trip, py::arg("source"), py::arg("target"));
#ifdef FREEIO_STAMPS
  py::list phases;
  for (const char* name : kPhaseNames) phases.append(name);
  module.attr("phases") = phases;
  module.def(
      "take_timelines",
      [](int ordinal) {
        std::vector<Timeline> timelines;
        raise_unless_ok(take_timelines(ordinal, timelines));
        py::list rows;
        for (const Timeline& it : timelines) {
          const std::vector<uint64_t> spent(it.spent, it.spent + kPhases);
          rows.append(py::make_tuple(it.begin, it.end, spent));
        }
        return rows;
      },
      py::arg("ordinal"),
      "Of each CTA of the last synchronous exchange on this GPU: when it began and ended, and how "
      "long it spent in each of `phases`, in nanoseconds. Each is returned once.");
#endif
  module.def("nothing", &nothing_handler, "A custom call that launches an empty kernel.");
  starter().add_to(module);
  module.def("ffi_types", &ffi_types);
  module.def("ffi_targets", &ffi_targets);
}

}  // namespace freeio::cuda
