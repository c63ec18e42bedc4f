// Settings of the fake CUDA runtime, and what became of its launches.
#pragma once

#include <string>

namespace emulator {

// GPUs that there are, and multiprocessors of each.
void set_devices(int count, int multiprocessors);

// Runs all that was launched. What went wrong, or "".
std::string synchronize();

}  // namespace emulator
