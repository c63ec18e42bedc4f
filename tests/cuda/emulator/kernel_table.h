// The engine's kernels by address. A launch gives the parameters as bytes; what type they have, and
// so how to pass them, is known here.
#pragma once

#include <functional>

namespace emulator {

// Calls the kernel with a copy of its parameters; empty if it is not in the table.
std::function<void()> bind_kernel(const void* function, const void* params);

}  // namespace emulator
