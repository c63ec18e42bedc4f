// The engine's kernels by address. A launch has the parameters as bytes. This table knows their
// type, and so how to pass them.
#pragma once

#include <functional>

namespace emulator {

// A function that calls the kernel with a copy of these parameters; empty: the table lacks the
// kernel.
std::function<void()> bind_kernel(const void* function, const void* params);

}  // namespace emulator
