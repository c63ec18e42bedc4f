// How an engine's handlers are handed to Python, which registers them with XLA.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/buffers.h"
#include "core/operations.h"

namespace freeio {

template <typename T>
pybind11::capsule capsule(T* pointer) {
  return pybind11::capsule(reinterpret_cast<void*>(pointer));
}

// Adds to `types` the registration of the state that an engine keeps for a custom call.
template <typename Instance>
void add_ffi_type(const char* name, pybind11::dict& types) {
  static constexpr ffi::TypeInfo kInfo = ffi::MakeTypeInfo<Instance>();
  pybind11::dict type;
  type["type_id"] = capsule(&Instance::id);
  type["type_info"] = capsule(const_cast<ffi::TypeInfo*>(&kInfo));
  types[name] = type;
}
// {name: registration} for an engine with one type of state.
template <typename Instance>
pybind11::dict ffi_type(const char* name) {
  pybind11::dict types;
  add_ffi_type<Instance>(name, types);
  return types;
}

// The handlers of a custom call, by stage.
struct Stages {
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* execute;
  XLA_FFI_Handler* initialize = nullptr;  // before each run; null: none
};

inline pybind11::dict handlers_of(const Stages& stages) {
  pybind11::dict handlers;
  handlers["instantiate"] = capsule(stages.instantiate);
  handlers["execute"] = capsule(stages.execute);
  if (stages.initialize != nullptr) handlers["initialize"] = capsule(stages.initialize);
  return handlers;
}

// {target: handlers} for all operations. A target is called freeio_ and the name of the operation,
// as in the lowering.
inline pybind11::dict ffi_targets_of(const Stages& dispatch, const Stages& dispatch_along,
                                     const Stages& combine, const Stages& combine_transpose) {
  pybind11::dict targets;
  const auto add = [&](Operation operation, const Stages& stages) {
    targets[(std::string("freeio_") + name_of(operation)).c_str()] = handlers_of(stages);
  };
  add(Operation::kDispatch, dispatch);
  add(Operation::kDispatchAlong, dispatch_along);
  add(Operation::kCombine, combine);
  add(Operation::kCombineTranspose, combine_transpose);
  return targets;
}

}  // namespace freeio
