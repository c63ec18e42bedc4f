// Linked before the kernels: their shared variables follow this one in memory. (A section of their
// own would say it better, but GCC ignores that attribute in templates.)
#include "shared_section.h"

alignas(64) std::byte emulator_shared_begin[64];
