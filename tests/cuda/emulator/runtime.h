// Settings of the fake CUDA runtime, and what became of its launches.
#pragma once

#include <string>

namespace emulator {

// GPUs that there are, and multiprocessors of each.
void set_devices(int count, int multiprocessors);

// Shared memory that a GPU gives a kernel.
void set_shared_bytes(size_t bytes);

// Whether some thread captures a stream: calls that would spoil that are refused on threads whose
// capture mode is not relaxed, as CUDA does for captures of the mode "global".
void set_capturing(bool capturing);

// Whether the GPUs' links have native atomics, as NVLink has.
void set_native_atomics(bool native);

// Runs all that was launched. What went wrong, or "".
std::string synchronize();

}  // namespace emulator
