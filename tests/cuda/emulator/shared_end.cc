// Linked after the kernels, so that their shared variables come before this one: shared_begin.cc.
#include "shared_section.h"

alignas(64) std::byte emulator_shared_end[64];
