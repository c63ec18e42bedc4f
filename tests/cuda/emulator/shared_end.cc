// Linked after the kernels, see shared_begin.cc.
#include "shared_section.h"

alignas(64) std::byte emulator_shared_end[64];
