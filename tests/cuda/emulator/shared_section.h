// All `__shared__` variables of the kernels lie between these two. They have the values of the
// running CTA. The machine copies them when it switches to another CTA.
#pragma once

#include <cstddef>

extern std::byte emulator_shared_begin[64];
extern std::byte emulator_shared_end[64];
