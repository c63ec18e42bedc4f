// The functions of the emulated CUDA driver, by name.
#pragma once

namespace emulator {

// Null: the emulated driver does not have it.
void* find_driver_function(const char* name);

}  // namespace emulator
