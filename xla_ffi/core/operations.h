// The operations of both engines: each is one custom call.
#pragma once

#include <cstdint>

namespace freeio {

enum class Operation : uint32_t { kDispatch, kDispatchAlong, kCombine, kCombineTranspose };

constexpr const char* kOperationNames[] = {"dispatch", "dispatch_along", "combine",
                                           "combine_transpose"};

inline const char* name_of(Operation operation) {
  return kOperationNames[static_cast<uint32_t>(operation)];
}

}  // namespace freeio
