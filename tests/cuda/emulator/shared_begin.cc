// Linked before the kernels, so that their shared variables follow this one in memory. (A linker
// section for them would be clearer, but GCC ignores that attribute in templates.)
#include "shared_section.h"

alignas(64) std::byte emulator_shared_begin[64];
