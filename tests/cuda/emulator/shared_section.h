// All `__shared__` variables of the kernels lie between these two, once: the running CTA's.
#pragma once

#include <cstddef>

extern std::byte emulator_shared_begin[64];
extern std::byte emulator_shared_end[64];
