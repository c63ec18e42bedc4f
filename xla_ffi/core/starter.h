// Has Python start an engine in a process that has lowered no call.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <utility>

#include "core/buffers.h"

namespace freeio {

// Python starts an engine when it lowers a call. A process lowers nothing if it loads a program
// that another process compiled. There the first custom-call instance has the engine started.
class Starter {
 public:
  void add_to(pybind11::module_& module) {
    module.def(
        "set_starter",
        // Never deleted, because the interpreter may end before the engine does.
        [this](pybind11::function start) { start_ = new pybind11::function(std::move(start)); },
        pybind11::arg("start"),
        "The function to call before the first instance. It raises an error if it cannot start the "
        "engine.");
    module.def(
        "set_started", [this] { is_ready_ = true; },
        "The engine is ready, so the starter need not be called.");
  }

  // Called on the thread on which XLA makes an instance. JAX has released the GIL there.
  ffi::Error ensure() {
    if (is_ready_) return ffi::Error::Success();
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
  std::atomic<bool> is_ready_{false};
};

}  // namespace freeio
