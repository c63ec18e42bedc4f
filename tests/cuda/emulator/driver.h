// Memory of the fake driver.
#pragma once

namespace emulator {

// A driver function by name; null: there is none.
void* find_driver_function(const char* name);

}  // namespace emulator
