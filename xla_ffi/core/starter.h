// Starts an engine, which is Python's affair, where no call was lowered in this process.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <utility>

#include "core/buffers.h"

namespace freeio {

// Python starts an engine when it lowers a call. A process that loads a program which another one
// compiled lowers nothing: there the first instance has it started.
class Starter {
 public:
  void add_to(pybind11::module_& module) {
    module.def(
        "set_starter",
        // Lives as long as the process: the interpreter may be gone before the engine is.
        [this](pybind11::function start) { start_ = new pybind11::function(std::move(start)); },
        pybind11::arg("start"), "What to call before the first instance; raises where it cannot.");
    module.def(
        "set_started", [this] { started_ = true; },
        "The engine is ready: nothing is to be called.");
  }

  // On the thread that has XLA make an instance, which JAX has let go of the GIL.
  ffi::Error ensure() {
    if (started_) return ffi::Error::Success();
    pybind11::gil_scoped_acquire gil;
    try {
      (*start_)();
    } catch (const pybind11::error_already_set& error) {
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                        std::string(pybind11::str(error.value())));
    }
    return ffi::Error::Success();
  }

 private:
  pybind11::function* start_ = nullptr;
  std::atomic<bool> started_{false};
};

}  // namespace freeio
